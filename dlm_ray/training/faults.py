"""What a run goes past and what it stops at: steps and rows that are left out and counted, the file of a bad step, the alarm of the loss."""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dlm_ray.config.recipe import Recipe
from dlm_ray.data.order import Cursor, Order
from dlm_ray.data.reading import DataSequence

log = logging.getLogger(__name__)


@dataclass
class Faults:
    """Left out so far: every checkpoint lists it, and a resumed run goes on counting."""

    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    skipped_rows: dict[str, int] = field(default_factory=dict)
    """By what was wrong with their shard."""

    def as_dict(self) -> dict[str, Any]:
        """For a manifest."""
        return asdict(self)

    def count_step(self, is_skipped: bool) -> None:
        """One step has been taken, or left out."""
        self.skipped_steps += is_skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if is_skipped else 0

    def count_rows(self, bad_sequences: Iterable[str]) -> None:
        """Rows of one global batch that were replaced, each by its finding."""
        for finding in bad_sequences:
            if finding not in self.skipped_rows:
                log.warning("left out by data.on_bad_sample=skip: %s", finding)
            self.skipped_rows[finding] = self.skipped_rows.get(finding, 0) + 1


def bad_sequences(rows: Sequence[DataSequence]) -> list[str]:
    """Of the rows that stand for damaged ones."""
    return [row.finding for row in rows if row.finding]


def write_bad_step(
    run_dir: Path,
    recipe: Recipe,
    order: Order,
    *,
    step: int,
    cursor: Cursor,
    checkpoint: str | None,
    metrics: dict[str, float],
) -> Path:
    """`<run_dir>/bad_step_<step>.json`: all that it takes to run one step again.

    Args:
        run_dir: of the run.
        recipe: of the run.
        order: of the run.
        step: its number, counted from 1.
        cursor: before its rows.
        checkpoint: the last good one; the steps from there to this one follow from recipe and cursor.
        metrics: loss and gradient norm, which need not be finite.
    """
    references, _ = order.references(cursor, recipe.training.global_batch_size)
    content = {
        "step": step,
        "checkpoint": checkpoint,
        "metrics": {name: str(value) for name, value in metrics.items()},
        "draw": {"seed": recipe.seed, "step": step - 1, "global_batch_size": recipe.training.global_batch_size},
        "cursor": cursor.as_dict(),
        "rows": [
            {
                "source": recipe.data.sources[one.source].path,
                "shard": order.indexes[one.source].splits["train"].shards[one.shard].file,
                "row": one.row,
            }
            for one in references
        ],
        "recipe": recipe.model_dump(mode="json"),
    }
    path = run_dir / f"bad_step_{step:08d}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


class LossAlarm:
    """Warns of a logged loss far above those before it."""

    _REMEMBERED, _LEAST = 100, 20

    def __init__(self, deviations: float, losses: Sequence[float]):
        """`losses` are those that were logged before a resume."""
        self._deviations = deviations
        self._losses = deque(losses, maxlen=self._REMEMBERED)

    def rings(self, step: int, loss: float) -> bool:
        """Takes one loss in; whether it is a spike."""
        before = list(self._losses)
        if math.isfinite(loss):
            self._losses.append(loss)
        if not self._deviations or len(before) < self._LEAST:
            return False
        mean, deviation = statistics.fmean(before), statistics.stdev(before)
        is_spike = not loss <= mean + self._deviations * deviation  # also if it is no number
        if is_spike:
            log.warning(
                "loss spike at step %d: %.4g, and the %d logged before it are %.4g +- %.2g",
                step,
                loss,
                len(before),
                mean,
                deviation,
            )
        return is_spike
