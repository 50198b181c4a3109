"""What a run writes down: one JSON line an event, Weights & Biases beside it, and the arithmetic of throughput."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

from dlm_ray.config.errors import UserError
from dlm_ray.config.recipe import Recipe


class MetricsLog:
    """`metrics.jsonl` of a run directory, and W&B if the recipe asks for it. Used by rank 0 alone.

    Opening it for a resume at `start_step` drops the lines of steps that will be run again, so that the file holds every step once.
    """

    def __init__(self, recipe: Recipe, run_dir: Path, start_step: int):
        self.path = run_dir / "metrics.jsonl"
        kept = [line for line in self._lines() if json.loads(line)["step"] <= start_step]
        self.losses: list[float] = [event["loss"] for event in map(json.loads, kept) if "loss" in event]
        """Those that were logged before."""
        partial = self.path.with_suffix(".tmp")
        partial.write_text("".join(kept))
        os.replace(partial, self.path)
        self._file = self.path.open("a")
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
        """Whole lines that an earlier attempt wrote; a line that a kill cut short is left out."""
        if not self.path.exists():
            return []
        return [line for line in self.path.read_text().splitlines(keepends=True) if line.endswith("}\n")]

    def write(self, step: int, **values: Any) -> None:
        """One event after `step` optimizer steps."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def close(self) -> None:
        """Flushes both."""
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
    """FLOPs of forward and backward for one position of a row: 6 for each matrix parameter, attention's two products, and the head.

    Args:
        body_parameters: matrix parameters of the blocks (neither embeddings nor head).
        width, num_layers, num_positions: D, blocks, L.
        vocab_size: V.
        scored_share: of the positions, how many reach the vocabulary's projection (1 for AR, the mean mask probability for diffusion).
        visible_share: of the L keys, how many a query has to compute (about 1/2 causal, 1 bidirectional).
    """
    attention = 12 * num_layers * width * num_positions * visible_share
    return 6 * body_parameters + attention + 6 * width * vocab_size * scored_share
