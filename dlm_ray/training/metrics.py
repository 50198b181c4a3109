"""The metrics of a run: one JSON line per event, Weights & Biases, and the measures of throughput."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from dlm_ray.config.errors import UserError
from dlm_ray.config.recipe import Recipe

PROGRESS_FILE = "progress.json"
"""File of a run directory with the last step, for whoever follows the run."""
_PROGRESS_SECONDS = 1.0


class MetricsLog:
    """The `metrics.jsonl` of a run directory, and Weights & Biases if the recipe enables it. Only rank 0 uses it.

    A resume at `start_step` drops the lines of the steps that run again, so that the file holds every step once.
    """

    def __init__(self, recipe: Recipe, run_dir: Path, start_step: int):
        self.path = run_dir / "metrics.jsonl"
        kept = [line for line in self._lines() if json.loads(line)["step"] <= start_step]
        self.losses: list[float] = [event["loss"] for event in map(json.loads, kept) if "loss" in event]
        """The losses that were logged before `start_step`."""
        partial = self.path.with_suffix(".tmp")
        partial.write_text("".join(kept))
        os.replace(partial, self.path)
        self._file = self.path.open("a")
        self._advanced_at = -math.inf
        self._wandb = None
        if recipe.tracking.wandb != "disabled":
            wandb = _import_wandb(recipe.tracking.wandb)
            self._wandb = wandb.init(
                project=recipe.tracking.project,
                group=recipe.tracking.group,
                name=run_dir.name,
                id=run_dir.name,
                resume="allow",
                mode=recipe.tracking.wandb,
                dir=str(run_dir),
                config=recipe.model_dump(mode="json"),
            )

    def _lines(self) -> list[str]:
        """Return the complete lines of earlier attempts, without a line that a kill cut short."""
        if not self.path.exists():
            return []
        return [line for line in self.path.read_text().splitlines(keepends=True) if line.endswith("}\n")]

    def write(self, step: int, **values: object) -> None:
        """Write one event that follows `step` optimizer steps."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def advance(self, step: int, tokens_per_second: float) -> None:
        """Write `progress.json`, at most once a second: the last step, also between two lines of metrics.jsonl."""
        now = time.monotonic()
        if now - self._advanced_at < _PROGRESS_SECONDS:
            return
        self._advanced_at = now
        path = self.path.with_name(PROGRESS_FILE)
        partial = path.with_suffix(".tmp")
        partial.write_text(json.dumps({"step": step, "tokens_per_second": tokens_per_second}))
        os.replace(partial, path)

    def close(self) -> None:
        """Close the file, and finish the Weights & Biases run."""
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


def _import_wandb(mode: str) -> ModuleType:
    """Return the `wandb` module, which is an optional dependency.

    Raises:
        UserError: if it is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            f"tracking.wandb={mode} needs the package wandb, which is not installed; run `pip install wandb`, or set "
            "tracking.wandb=disabled"
        ) from error
    return wandb


class ThroughputClock:
    """Tokens per second of training only: the first step, which warms up, and the time of `paused` do not count."""

    def __init__(self) -> None:
        self._mark: float | None = None
        self._tokens, self._seconds = 0, 0.0

    def count(self, tokens: int) -> None:
        """Note the end of a step of `tokens` tokens."""
        now = time.perf_counter()
        if self._mark is not None:
            self._tokens, self._seconds = self._tokens + tokens, self._seconds + now - self._mark
        self._mark = now

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside the context."""
        entered = time.perf_counter()
        yield
        if self._mark is not None:
            self._mark += time.perf_counter() - entered

    def tokens_per_second(self) -> float:
        """Return the mean since the first step; 0 before the second."""
        return self._tokens / self._seconds if self._seconds else 0.0


def flops_per_token(
    *,
    body_parameters: int,
    width: int,
    num_layers: int,
    num_positions: int,
    vocab_size: int,
    scored_share: float,
    visible_share: float,
) -> float:
    """Return forward and backward FLOPs per position: 6 per matrix parameter, two attention products, the head.

    Args:
        body_parameters: number of matrix parameters of the transformer blocks (without embeddings and head).
        width: D, the hidden size.
        num_layers: number of transformer blocks.
        num_positions: L, the length of a sequence.
        vocab_size: V.
        scored_share: share of the positions that reach the projection to the vocabulary (1 for autoregressive models,
            the mean mask probability for diffusion).
        visible_share: share of the L keys that a query computes (about 1/2 if causal, 1 if bidirectional).
    """
    attention = 12 * num_layers * width * num_positions * visible_share
    return 6 * body_parameters + attention + 6 * width * vocab_size * scored_share
