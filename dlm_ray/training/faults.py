"""Faults of a run: counts of skipped steps and sequences, the file of a bad step, and the alarm for loss spikes."""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import cast

from dlm_ray.config.manifest_fields import FaultFields
from dlm_ray.config.recipe import Recipe
from dlm_ray.data.order import Cursor, Order
from dlm_ray.data.reading import DataSequence

log = logging.getLogger(__name__)


@dataclass
class Faults:
    """Counts of skipped steps and sequences; every checkpoint stores them, and a resumed run continues them."""

    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    skipped_sequences: dict[str, int] = field(default_factory=dict)
    """The number of skipped sequences by the error of their shard."""

    def as_dict(self) -> FaultFields:
        """Return the counts as a manifest holds them."""
        return cast("FaultFields", asdict(self))

    def count_step(self, is_skipped: bool) -> None:
        """Count one step, taken or skipped."""
        self.skipped_steps += is_skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if is_skipped else 0

    def count_sequences(self, findings: Iterable[str]) -> None:
        """Count the replaced sequences of one global batch, each given by its finding."""
        for finding in findings:
            if finding not in self.skipped_sequences:
                log.warning("skipped by data.on_bad_sample=skip: %s", finding)
            self.skipped_sequences[finding] = self.skipped_sequences.get(finding, 0) + 1


def bad_sequences(sequences: Sequence[DataSequence]) -> list[str]:
    """Return the finding of every sequence of padding that replaces an unreadable one."""
    return [sequence.finding for sequence in sequences if sequence.finding]


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
    """Write `<run_dir>/bad_step_<step>.json`, with everything that is needed to run one step again.

    Args:
        run_dir: the run directory.
        recipe: the recipe of the run.
        order: the order of the run.
        step: the number of the step, counted from 1.
        cursor: the position before the sequences of the step.
        checkpoint: the last valid checkpoint; recipe and cursor determine the steps from there to this one.
        metrics: loss and gradient norm, which need not be finite.

    Returns:
        The path of the file.
    """
    references, _ = order.references(cursor, recipe.training.global_batch_size)
    content = {
        "step": step,
        "checkpoint": checkpoint,
        "metrics": {name: str(value) for name, value in metrics.items()},
        "draw": {"seed": recipe.seed, "step": step - 1, "global_batch_size": recipe.training.global_batch_size},
        "cursor": cursor.as_dict(),
        "sequences": [
            {
                "source": recipe.data.sources[place.source].path,
                "shard": order.indexes[place.source].splits["train"].shards[place.shard].file,
                "sequence": place.sequence,
            }
            for place in references
        ],
        "recipe": recipe.model_dump(mode="json"),
    }
    path = run_dir / f"bad_step_{step:08d}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


class LossAlarm:
    """Warns of a logged loss far above the previous ones.

    Args:
        deviations: threshold in standard deviations above the mean; 0 disables the alarm.
        losses: the losses that were logged before a resume.
    """

    _WINDOW, _MIN_LOSSES = 100, 20

    def __init__(self, deviations: float, losses: Sequence[float]):
        self._deviations = deviations
        self._losses = deque(losses, maxlen=self._WINDOW)

    def is_spike(self, step: int, loss: float) -> bool:
        """Add one loss, and return whether it is a spike; NaN and infinity are spikes."""
        before = list(self._losses)
        if math.isfinite(loss):
            self._losses.append(loss)
        if not self._deviations or len(before) < self._MIN_LOSSES:
            return False
        mean, deviation = statistics.fmean(before), statistics.stdev(before)
        is_spike = not loss <= mean + self._deviations * deviation  # also true for NaN
        if is_spike:
            log.warning(
                "loss spike at step %d: %.4g; the previous %d logged losses are %.4g +- %.2g",
                step,
                loss,
                len(before),
                mean,
                deviation,
            )
        return is_spike
