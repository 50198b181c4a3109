"""`python -m dlm_ray.evaluation.studies.annealing`: how an AR model becomes bidirectional, with and without its shift (DiffuLLaMA's Tables 3 and 5, small).

Data, base and recipe are the quickstart's. Every arm starts from the same AR model and takes the same steps on the same rows; the bound is over all of t,
at the state after annealing, with common draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dlm_ray.evaluation.studies import objectives, runner
from dlm_ray.evaluation.studies.runner import Arm, Outcome, Study

from dlm_ray.checkpoint.commit import read_manifest
from dlm_ray.checkpoint.weights import our_checkpoint
from dlm_ray.config.errors import UserError
from dlm_ray.config.load import read_tree
from dlm_ray.data.index import load_index
from dlm_ray.generation.loading import load
from dlm_ray.training import loop

STEPS = 120
HELD_OUT_ROWS, DRAWS = 200, 4
SIZES = (4, 16, 64)
"""Of the blocks before they are as large as the row, which is masked diffusion."""
# How the future is revealed, and the share of the steps that it takes.
WAYS: dict[str, tuple[str, float]] = {
    "none": ("none", 0.0),
    "bernoulli 10 %": ("bernoulli", 0.1),
    "bernoulli 30 %": ("bernoulli", 0.3),
    "window 30 %": ("window", 0.3),
    "growing blocks 30 %": ("blocks", 0.3),
}
PUBLISHED = {
    "bernoulli 30 %, shift": "45.4 / 49.7",
    "none, shift": "43.3 / 47.2",
    "bernoulli 30 %, no shift": "33.5 / 34.5",
}
ORDERINGS = (
    ("bernoulli 30 %, shift", "none, shift", "DiffuLLaMA, Table 3: annealing helps"),
    ("bernoulli 30 %, shift", "bernoulli 30 %, no shift", "DiffuLLaMA, Table 3; Dream, I-DLM: keep the shift"),
    ("bernoulli 30 %, no shift", "bernoulli 30 %, shift", "Efficient-DLM; SDAR, LLaDA2.0: drop the shift"),
    ("none, no shift", "none, shift", "SDAR: neither shift nor annealing"),
    ("growing blocks 30 %, shift", "none, shift", "LLaDA2.0: blocks that grow"),
    ("growing blocks 30 %, no shift", "none, no shift", "LLaDA2.0: blocks that grow"),
)


def study(seeds: int, steps: int, sequence_length: int) -> Study:
    """The arms; an arm's settings are a whole recipe but for seed, data and base."""
    names = [(way, shift, f"{way}, {'shift' if shift else 'no shift'}") for shift in (True, False) for way in WAYS]
    return Study(
        name="annealing",
        question="From one AR model in the same steps: does it help to reveal the future by and by, and to keep the shift?",
        metric="bits_per_byte",
        unit="bits per byte",
        arms=tuple(
            Arm(name, _settings(way, shift, steps, sequence_length), PUBLISHED.get(name, ""))
            for way, shift, name in names
        ),
        seeds=tuple(range(seeds)),
        baseline="none, shift",
        orderings=ORDERINGS,
    )


def _settings(way: str, shift: bool, steps: int, sequence_length: int) -> dict[str, Any]:
    pattern, share = WAYS[way]
    tree = read_tree("quickstart")
    tree["training"] = {"steps": steps, "global_batch_size": 8, "micro_batch_size": 8}
    tree["validation"] = {"sequences": 0}
    tree["checkpoint"] = {"every_steps": steps, "keep_last": 1}
    tree["parallelism"] = {"workers": 1}
    tree["optimizer"] |= {"warmup_steps": min(15, steps // 4), "warmup_share": None}
    tree["objective"]["shift"] = shift
    num_steps = max(len(SIZES), round(share * steps))
    if pattern == "blocks":
        tree["objective"] |= {"name": "block", "block_tokens": sequence_length}
        tree["curriculum"] = {
            "block_sizes": [{"block_tokens": size, "steps": num_steps // len(SIZES)} for size in SIZES]
        }
    else:
        tree["curriculum"] = {"annealing": {"pattern": pattern, "steps": num_steps if share else 0}}
    return tree


def one(arm: Arm, seed: int, folder: Path, data: str, base: str) -> Outcome:
    """Trains, and scores held-out text."""
    loop.fit(objectives.recipe_of(arm, seed, data, base), folder)
    scored = load(folder).score(data, max_sequences=HELD_OUT_ROWS, draws_per_sequence=DRAWS)
    metrics = {"bits_per_byte": scored.bits_per_byte}
    return Outcome(metrics, (scored.nats / math.log(2)).tolist(), scored.num_bytes.tolist())


def notes(base: str, data: str, steps: int) -> Sequence[str]:
    """What a reader has to know."""
    manifest, index = read_manifest(base), load_index(data)
    documents = {name: split.documents for name, split in index.splits.items()}
    return [
        f"Data, AR base ({manifest.step} steps) and recipe are the quickstart's: {documents['train']} documents, rows of {index.sequence_length} tokens, 8 a step, "
        f"{steps} steps. Scored: {HELD_OUT_ROWS} held-out rows, evenly spaced, {DRAWS} draws each, averaged weights.",
        f"The share is of the steps; growing blocks are of {', '.join(map(str, SIZES))} tokens for a third of it each, then of the row. `none` sees everything "
        "from the first step. As published: DiffuLLaMA's Table 3, accuracy on GSM8K after fine-tuning GPT2-S / GPT2-M (higher is better).",
        "The papers compare models of 0.1 to 8 B parameters after 0.1 to 100 G tokens, by tasks: what is said here is about this size and these steps alone. "
        "One base: intervals are over seeds of the adaptation and over documents, not over bases.",
    ]


def main() -> None:
    """The command line."""
    arguments = objectives.command_line(
        "dlm_ray.evaluation.studies.annealing", __doc__ or "", STEPS, needs_quickstart=True
    )
    data, runs = str(arguments.quickstart / "data"), sorted((arguments.quickstart / "runs").glob("quickstart-base-*"))
    base = our_checkpoint(str(runs[0])) if len(runs) == 1 else None
    if base is None:
        raise UserError(
            f"--quickstart {arguments.quickstart}: no folder of `dlm-ray quickstart` with a base of its own; make one"
        )
    chosen = study(arguments.seeds, arguments.steps, load_index(data).sequence_length)
    records = runner.run(
        chosen,
        lambda arm, seed, folder: one(arm, seed, folder, data, base),
        arguments.out,
        arguments.minutes,
        objectives.print_progress,
    )
    objectives.finish(chosen, records, arguments.results or arguments.out, notes(base, data, arguments.steps))


if __name__ == "__main__":
    main()
