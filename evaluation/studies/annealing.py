"""Study `annealing`: does an AR model become bidirectional better step by step, and with its shift?

Every arm starts from the same autoregressive (AR) model and takes the same steps on the same sequences.

Arms: five ways to reveal the future (all at once; Bernoulli attention masks over 10 % or 30 % of the steps; a growing
window; growing blocks), each with and without the shift.
Claims: DiffuLLaMA's Tables 3 and 5 (annealing and the shift help); Dream and I-DLM keep the shift; Efficient-DLM,
SDAR and LLaDA2.0 drop it; LLaDA2.0 grows blocks.
Measured: the bound over all of t after annealing, with common draws. Data, base and recipe are those of
`dlm-ray quickstart --base own`.
Command: python -m dlm_ray.evaluation.studies.annealing --quickstart QUICKSTART_DIR --out DIR
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dlm_ray.evaluation.studies import setup
from dlm_ray.evaluation.studies.runner import Arm, Outcome, Study

from dlm_ray.checkpoint.manifest import read_manifest
from dlm_ray.checkpoint.weights import our_checkpoint
from dlm_ray.config.errors import UserError
from dlm_ray.config.load import read_tree
from dlm_ray.config.manifest_fields import JsonObject
from dlm_ray.config.paths import folder_argument
from dlm_ray.data.index import load_index
from dlm_ray.generation.loading import load
from dlm_ray.training import loop

STEPS, BATCH_SIZE = 120, 8
HELD_OUT_SEQUENCES, DRAWS_PER_SEQUENCE = 200, 4
GROWING_SIZES = (4, 16, 64)
"""Block sizes before blocks are whole sequences, which is masked diffusion."""
# The pattern that reveals the future, and its share of the steps.
SCHEDULES: dict[str, tuple[str, float]] = {
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


def build_study(num_seeds: int, steps: int, sequence_length: int) -> Study:
    """Return the study; the settings of an arm are its recipe without seed, data and base."""
    arms = []
    for shift in (True, False):
        for schedule in SCHEDULES:
            name = f"{schedule}, {'shift' if shift else 'no shift'}"
            arms.append(Arm(name, _settings(schedule, shift, steps, sequence_length), PUBLISHED.get(name, "")))
    return Study(
        name="annealing",
        question="From one AR model in the same steps: does it help to reveal the future step by step, and to keep the "
        "shift?",
        metric="bits_per_byte",
        unit="bits per byte",
        arms=tuple(arms),
        seeds=tuple(range(num_seeds)),
        baseline="none, shift",
        orderings=ORDERINGS,
    )


def _settings(schedule: str, shift: bool, steps: int, sequence_length: int) -> JsonObject:
    """Return the recipe of an arm."""
    pattern, share = SCHEDULES[schedule]
    tree = read_tree("quickstart_own")
    tree["training"] = {"steps": steps, "global_batch_size": BATCH_SIZE, "micro_batch_size": BATCH_SIZE}
    tree["validation"] = {"sequences": 0}
    tree["checkpoint"] = {"every_steps": steps, "keep_last": 1}
    tree["parallelism"] = {"workers": 1}
    tree["optimizer"] |= {"warmup_steps": min(15, steps // 4), "warmup_share": None}
    tree["objective"]["shift"] = shift
    num_steps = max(len(GROWING_SIZES), round(share * steps))
    if pattern == "blocks":
        tree["objective"] |= {"name": "block", "block_tokens": sequence_length}
        stages = [{"block_tokens": size, "steps": num_steps // len(GROWING_SIZES)} for size in GROWING_SIZES]
        tree["curriculum"] = {"block_sizes": stages}
    else:
        tree["curriculum"] = {"annealing": {"pattern": pattern, "steps": num_steps if share else 0}}
    return tree


def run_arm(arm: Arm, seed: int, folder: Path, data: str, base: str) -> Outcome:
    """Train an arm and score held-out text."""
    loop.fit(setup.complete_recipe(arm.settings, arm.name, data, {"base": base}, seed), folder)
    scored = load(folder).score(data, max_sequences=HELD_OUT_SEQUENCES, draws_per_sequence=DRAWS_PER_SEQUENCE)
    return setup.scored_outcome(scored, {"bits_per_byte": scored.bits_per_byte})


def notes(base: str, data: str, steps: int) -> Sequence[str]:
    """Return the report's notes."""
    manifest, index = read_manifest(base), load_index(data)
    sizes = ", ".join(map(str, GROWING_SIZES))
    return [
        f"Data, AR base ({manifest.step} steps) and recipe are the quickstart's: {index.splits['train'].documents} "
        f"documents, {BATCH_SIZE} sequences of {index.sequence_length} tokens per step, {steps} steps. Scored with "
        f"the averaged weights: {HELD_OUT_SEQUENCES} held-out sequences, evenly spaced, with {DRAWS_PER_SEQUENCE} "
        "draws each.",
        f"Percentages are shares of the steps. Growing blocks have {sizes} tokens for a third of that share each, "
        "then the whole sequence. `none` sees everything from the first step. Published: DiffuLLaMA's Table 3, "
        "accuracy on GSM8K after fine-tuning GPT2-S / GPT2-M (higher is better).",
        "The papers compare models of 0.1 to 8 B parameters on tasks after 0.1 to 100 G tokens; these results are "
        "about this size and these steps only. There is one base: intervals are over seeds of the adaptation and "
        "over documents, not over bases.",
    ]


def quickstart_base(folder: Path) -> str:
    """Return the last checkpoint of the AR base in a folder of `dlm-ray quickstart --base own`.

    Raises:
        UserError: if the folder has no base of its own, or several.
    """
    runs = sorted((folder / "runs").glob("quickstart-base-*"))
    base = our_checkpoint(str(runs[0])) if len(runs) == 1 else None
    if base is None:
        raise UserError(
            f"--quickstart {folder}: this is no folder of `dlm-ray quickstart` with exactly one base of its own; run "
            "`dlm-ray quickstart --base own --out DIR` and give that folder"
        )
    return base


def main() -> None:
    """Run the study from the command line."""
    parser = setup.argument_parser("annealing", __doc__)
    setup.add_training_arguments(parser, STEPS)
    parser.add_argument(
        "--quickstart",
        type=folder_argument,
        required=True,
        help="the --out folder of `dlm-ray quickstart --base own`: data and base",
    )
    arguments = setup.parse_arguments(parser)
    data, base = str(arguments.quickstart / "data"), quickstart_base(arguments.quickstart)
    setup.run_and_report(
        build_study(arguments.seeds, arguments.steps, load_index(data).sequence_length),
        lambda arm, seed, folder: run_arm(arm, seed, folder, data, base),
        arguments.out,
        arguments,
        lambda records: notes(base, data, arguments.steps),
    )


if __name__ == "__main__":
    main()
