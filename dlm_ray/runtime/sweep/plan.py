"""What all processes of a sweep share: the plan, its trials, and where they keep their files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypedDict

from dlm_ray.checkpoint import listing
from dlm_ray.config.recipe import Recipe
from dlm_ray.config.space import Settings
from dlm_ray.config.sweep_load import Loaded
from dlm_ray.runtime.events import complete_lines

METRIC: Final = "bits_per_byte"
"""What searchers and schedulers judge trials by: the validation bound."""


Clone = TypedDict("Clone", {"from": int, "step": int, "run_dir": str, "settings": Settings})
"""A checkpoint that a trial of population-based training went on from.

`from` and `run_dir` are the copied trial's number and run directory; `settings` are the trial's own from there on.
"""


class Suggestion(TypedDict):
    """The configuration of a trial: what a searcher suggests, and Tune hands to the driver."""

    number: int
    settings: Settings


@dataclass(frozen=True)
class Trial:
    """An ended trial, as a line of trials.jsonl."""

    number: int
    settings: Settings
    status: str
    """`finished`, `stopped` (by the scheduler) or `failed`."""
    reason: str = ""
    """Why it failed."""
    run_dir: str = ""
    step: int = 0
    """Last committed step."""
    clones: list[Clone] = field(default_factory=list)
    """`pbt`: the checkpoints of other trials that it went on from."""


class Validation(TypedDict):
    """A validation of a run, as it is reported to Tune."""

    step: int
    tokens: int
    bits_per_byte: float


@dataclass(frozen=True)
class Plan:
    """What a process needs to run any trial of a sweep."""

    loaded: Loaded
    out: str
    sequence_length: int
    data: str | None = None
    """Folder of the sweep's own data, if it builds some."""
    base: str | None = None
    """Run directory of the sweep's own base, if it trains one."""
    overrides: tuple[str, ...] = ()
    """Overrides of confirming runs; empty for trials."""

    @property
    def is_confirming(self) -> bool:
        """Whether this is the plan of the confirming runs rather than of the trials."""
        return bool(self.overrides)

    def recipe(self, settings: Settings) -> Recipe:
        """Return the recipe of a trial."""
        return self.loaded.recipe(settings, self.data, self.base, self.overrides)

    def folder(self, number: int) -> Path:
        """Return the folder of a trial, with its run and its notes."""
        return Path(self.out) / ("confirmed" if self.is_confirming else "trials") / f"{number:04d}"

    def tokens(self, recipe: Recipe, steps: int) -> int:
        """Return the training tokens of a number of steps."""
        return steps * recipe.training.global_batch_size * self.sequence_length

    def ended_trial(self, number: int, reason: str) -> Trial:
        """Return the record of a trial that has ended; `reason` is why it failed, or empty."""
        folder = self.folder(number)
        note = folder / "trial.json"
        if not note.exists():
            return Trial(number, {}, "failed", reason or "it was never started")
        fields = json.loads(note.read_text())
        step = max(listing.committed_steps(fields["run_dir"]), default=0)
        is_complete = step >= self.recipe(fields["settings"]).training.steps
        status = "failed" if reason else "finished" if is_complete else "stopped"
        return Trial(**fields, status=status, reason=reason, step=step, clones=clones_of(folder))

    def validations(self, run_dir: Path, recipe: Recipe) -> Iterator[Validation]:
        """Yield the validations of a run so far."""
        lines, _ = complete_lines(run_dir / "metrics.jsonl")
        for event in map(json.loads, lines):
            if METRIC in event.get("validation", {}):
                step: int = event["step"]
                bound: float = event["validation"][METRIC]
                yield {"step": step, "tokens": self.tokens(recipe, step), "bits_per_byte": bound}

    def curve(self, run_dir: Path, recipe: Recipe) -> list[tuple[float, float]]:
        """Return (tokens, bits per byte) of a run's validations."""
        return [(one["tokens"], one["bits_per_byte"]) for one in self.validations(run_dir, recipe)]


def clones_of(folder: Path) -> list[Clone]:
    """Return the clones that a trial has noted in its folder."""
    path = folder / "clones.json"
    clones: list[Clone] = json.loads(path.read_text()) if path.exists() else []
    return clones
