"""Study `scratch`: is an adapted AR model a better diffusion model than one trained from scratch on the same tokens?

Arms: a small autoregressive (AR) base adapted with the recipe `quickstart_own`; the same network, objective and tokens
    without the base; the AR base continued on the same tokens.
Claims: DiffuLLaMA and MD4's review: adaptation needs far fewer tokens than training from scratch.
Measured: the bound over all of t, exact for the AR base, on held-out documents with common draws.
Command: python -m dlm_ray.evaluation.studies.scratch --out DIR

Text and base are those of `dlm-ray quickstart --base own`: the source code and documentation of this Python.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dlm_ray.evaluation.studies import setup
from dlm_ray.evaluation.studies.runner import Arm, Outcome, Study

from dlm_ray.config.load import read_tree
from dlm_ray.data import build, sources
from dlm_ray.data.corpus import write_corpus
from dlm_ray.data.index import load_index
from dlm_ray.data.tokenizer import identity, load_tokenizer, train_tokenizer
from dlm_ray.generation.loading import load
from dlm_ray.training import loop

STEPS = 240
SEQUENCE_LENGTH, VOCAB_SIZE, HELD_OUT = 256, 4096, 0.03
HELD_OUT_SEQUENCES, DRAWS_PER_SEQUENCE = 200, 6
SCRATCH_LEARNING_RATE, SCRATCH_WARMUP_SHARE = 2e-3, 0.125
"""The base's own rate: from nothing, a higher rate than the adaptation's does better."""
_SEQUENCES_PER_SHARD = 4096
ADAPTED, SCRATCH, CONTINUED = "adapted", "from scratch", "AR base, continued"


def build_study(num_seeds: int, steps: int) -> Study:
    """Return the study; the settings of an arm are its recipe without seed, data and network."""
    return Study(
        name="scratch",
        question="On the same tokens: is an AR model that was adapted to diffusion better than a diffusion model from "
        "scratch?",
        metric="bits_per_byte",
        unit="bits per byte",
        arms=tuple(Arm(name, _settings(name, steps)) for name in (ADAPTED, SCRATCH, CONTINUED)),
        seeds=tuple(range(num_seeds)),
        baseline=SCRATCH,
        orderings=((ADAPTED, SCRATCH, "DiffuLLaMA: adapting an AR model costs fewer tokens"),),
    )


def _settings(name: str, steps: int) -> dict[str, Any]:
    """Return the recipe of an arm."""
    tree = read_tree("quickstart_own")
    tree["training"]["steps"] = steps
    tree["validation"] = {"sequences": 0}
    tree["checkpoint"] = {"every_steps": steps, "keep_last": 1}
    tree["parallelism"] = {"workers": 1}
    if name == SCRATCH:
        tree["model"] = {"architecture": read_tree("quickstart_base")["model"]["architecture"]}
        tree["optimizer"] |= {"learning_rate": SCRATCH_LEARNING_RATE, "warmup_share": SCRATCH_WARMUP_SHARE}
    if name == CONTINUED:
        tree["objective"] = {"name": "autoregressive"}
    if name != ADAPTED:
        tree["curriculum"] = {}
    return tree


def prepare(out: Path, max_bytes: int | None = None, base_steps: int | None = None) -> tuple[str, str]:
    """Build the data and train the AR base in `out`, unless they exist, and return the folders of both.

    Args:
        out: the folder of the study.
        max_bytes: the size of the text; all of it if None.
        base_steps: steps of the base; those of the recipe `quickstart_base` if None.
    """
    data, base = out / "data", out / "base"
    if not (data / "index.json").exists():
        _build_data(out, data, max_bytes)
    tree = read_tree("quickstart_base")
    if base_steps is not None:
        tree["training"]["steps"] = base_steps
    tree["parallelism"] = {"workers": 1}
    loop.fit(setup.complete_recipe(tree, "the base", str(data), tree["model"]), base)
    return str(data), str(base)


def _build_data(out: Path, data: Path, max_bytes: int | None) -> None:
    text, folder = out / "corpus.jsonl", data / "tokenizer"
    out.mkdir(parents=True, exist_ok=True)
    write_corpus(str(text), max_bytes)
    with text.open(encoding="utf-8") as lines:
        train_tokenizer((json.loads(line)["text"] for line in lines), VOCAB_SIZE).save_pretrained(folder)
    tokenizer = identity(load_tokenizer(str(folder)))
    settings = build.Settings(tokenizer.sha256, SEQUENCE_LENGTH, HELD_OUT, "text", _SEQUENCES_PER_SHARD)
    chunks = sources.list_parts([str(text)])
    results = [build.build_part(chunk, str(folder), settings, str(data)) for chunk in chunks]
    build.write_index(str(data), results, SEQUENCE_LENGTH, tokenizer, {"settings": {}, "inputs": []})


def run_arm(arm: Arm, seed: int, folder: Path, data: str, base: str) -> Outcome:
    """Train an arm and score held-out text."""
    model = {"base": base} if arm.name != SCRATCH else arm.settings["model"]
    loop.fit(setup.complete_recipe(arm.settings, arm.name, data, model, seed), folder)
    scored = load(folder).score(data, max_sequences=HELD_OUT_SEQUENCES, draws_per_sequence=DRAWS_PER_SEQUENCE)
    return setup.scored_outcome(scored, {"bits_per_byte": scored.bits_per_byte})


def notes(data: str, steps: int) -> Sequence[str]:
    """Return the report's notes."""
    index = load_index(data)
    return [
        f"Text: the source code and documentation of Python, {index.splits['train'].documents} documents. The base and "
        f"the arms are the recipes `quickstart_base` and `quickstart_own` with {steps} steps; the arm from scratch has "
        f"the learning rate {SCRATCH_LEARNING_RATE:g}, and no annealing. Scored with the averaged weights: "
        f"{HELD_OUT_SEQUENCES} held-out sequences, evenly spaced, with {DRAWS_PER_SEQUENCE} draws each.",
        "There is one base: intervals are over seeds of the arms and over documents, not over bases.",
    ]


def main() -> None:
    """Run the study from the command line."""
    parser = setup.argument_parser("scratch", __doc__)
    setup.add_training_arguments(parser, STEPS)
    arguments = setup.parse_arguments(parser)
    data, base = prepare(arguments.out)
    setup.run_and_report(
        build_study(arguments.seeds, arguments.steps),
        lambda arm, seed, folder: run_arm(arm, seed, folder, data, base),
        arguments.out,
        arguments,
        lambda records: notes(data, arguments.steps),
    )


if __name__ == "__main__":
    main()
