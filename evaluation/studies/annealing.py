"""`python -m dlm_ray.evaluation.studies.annealing`: how an AR model becomes bidirectional, with and without its shift (DiffuLLaMA's Tables 3 and 5, small).

Text, network and optimizer are those of the study `objectives`. Every arm starts from the same AR model and takes the same steps; the bound is
over all of t at the state after annealing, with common draws.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dlm_ray.evaluation.studies import objectives, runner
from dlm_ray.evaluation.studies.runner import Arm, Outcome, Study

from dlm_ray.serving.loading import load
from dlm_ray.training import loop

STEPS = 250
SHARE = 0.3
SIZES = (4, 16, 64)
_PATTERNS = ("none", "bernoulli", "window", "block curriculum")
ARMS = tuple(
    Arm(f"{pattern}, {'shift' if shift else 'no shift'}", {"pattern": pattern, "shift": shift})
    for shift in (True, False)
    for pattern in _PATTERNS
)
ORDERINGS = (
    ("bernoulli, shift", "none, shift", "DiffuLLaMA: annealing helps"),
    ("bernoulli, shift", "bernoulli, no shift", "DiffuLLaMA, Dream, I-DLM: keep the shift"),
    ("bernoulli, no shift", "bernoulli, shift", "Efficient-DLM, SDAR: drop the shift"),
    ("bernoulli, shift", "window, shift", "none; DiffuLLaMA draws pairs alone"),
    ("block curriculum, shift", "none, shift", "LLaDA2.0: blocks that grow"),
    ("block curriculum, no shift", "none, no shift", "LLaDA2.0: blocks that grow"),
)


def study(seeds: int, steps: int) -> Study:
    """The arms; an arm's settings are a whole recipe but for seed, data and base."""
    return Study(
        name="annealing",
        question="From one AR model in the same steps: does it help to reveal the future by and by, and to keep the shift?",
        metric="bits_per_character",
        unit="bits per character",
        arms=tuple(replace(arm, settings=_settings(steps, **arm.settings)) for arm in ARMS),
        seeds=tuple(range(seeds)),
        baseline="none, shift",
        orderings=ORDERINGS,
        ratios=("train_seconds",),
    )


def _settings(steps: int, pattern: str, shift: bool) -> dict[str, Any]:
    """A third of the steps is spent on annealing, or on the stages of blocks; blocks as large as the row are masked diffusion."""
    share = max(len(SIZES), round(SHARE * steps))
    if pattern == "block curriculum":
        stages = [{"block_tokens": size, "steps": share // len(SIZES)} for size in SIZES]
        own = objectives.tree({"name": "block", "block_tokens": objectives.ROW_TOKENS, "shift": shift}, steps)
        return {**own, "curriculum": {"block_sizes": stages}}
    own = objectives.tree({"name": "masked", "shift": shift}, steps)
    return own if pattern == "none" else {**own, "curriculum": {"annealing": {"pattern": pattern, "steps": share}}}


def one(arm: Arm, seed: int, folder: Path, data: str, base: str) -> Outcome:
    """Trains, and scores held-out text."""
    started = time.monotonic()
    loop.fit(objectives.recipe_of(arm, seed, data, base), folder)
    seconds = time.monotonic() - started
    scored = load(folder).score(data, max_rows=objectives.HELD_OUT_ROWS, draws_per_row=objectives.DRAWS)
    metrics = {"bits_per_character": scored.bits_per_byte, "train_seconds": seconds}
    return Outcome(metrics, (scored.nats / math.log(2)).tolist(), scored.num_bytes.tolist())


def notes(records: Sequence[runner.Record], corpus: dict[str, Any], steps: int) -> list[str]:
    """What a reader has to know."""
    return [
        f"Text, network and optimizer are those of the study `objectives`: {corpus['documents']} documents, {corpus['characters']:,} characters (sha256 of "
        f"the source {corpus['sha256'][:12]}); rows of {objectives.ROW_TOKENS} characters, {objectives.ROWS} a step, {steps} steps from one AR model "
        f"({objectives.BASE_STEPS} steps).",
        f"Annealing and the stages of blocks ({', '.join(map(str, SIZES))}, then the row) take {SHARE:.0%} of the steps. "
        "`none` sees everything from the first step.",
        "The papers compare models of 0.1 to 7 B parameters after 0.1 to 65 G tokens, by tasks and perplexity: what is said here is about this size alone.",
    ]


def main() -> None:
    """The command line."""
    arguments = objectives.command_line("dlm_ray.evaluation.studies.annealing", __doc__ or "", STEPS)
    chosen = study(arguments.seeds, arguments.steps)
    corpus, data, base = objectives.prepare(arguments.out)
    records = runner.run(
        chosen, lambda arm, seed, folder: one(arm, seed, folder, data, base), arguments.out, arguments.minutes, objectives.tell
    )
    objectives.finish(chosen, records, arguments.results or arguments.out, notes(records, corpus, arguments.steps))


if __name__ == "__main__":
    main()
