"""What the studies share: the text and the network that they train, the measurements of a run, and the command line.

The studies `objectives` and `block_size` use the quickstart's corpus in text8's 27 letters (`text8.py`), one token
per character. They start from one autoregressive (AR) model, a Llama with 0.8 M parameters, because from scratch
their budget would leave a masked model at the letter frequencies. A run takes about a minute on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from dlm_ray.evaluation.studies import runner, text8
from dlm_ray.evaluation.studies.comparison import judge_orderings
from dlm_ray.evaluation.studies.report import write_report
from dlm_ray.evaluation.studies.runner import Outcome, Record, RunArm, Study
from dlm_ray.evaluation.studies.variance import draw_variances
from dlm_ray.evaluation.trained import trained_objective

from dlm_ray.checkpoint.weights import our_checkpoint
from dlm_ray.config.load import validate
from dlm_ray.config.manifest_fields import JsonObject
from dlm_ray.config.paths import folder_argument
from dlm_ray.config.recipe import Recipe
from dlm_ray.data.reading import read_split
from dlm_ray.diffusion.denoiser import Objective
from dlm_ray.generation.loading import load
from dlm_ray.generation.scoring import Scored
from dlm_ray.generation.text_model import TextModel
from dlm_ray.training import loop

SEQUENCE_LENGTH, BATCH_SIZE, LEARNING_RATE = 128, 16, 2e-3
BASE_STEPS = 800
"""Steps of the AR model that the runs start from."""
HELD_OUT_SEQUENCES, DRAWS_PER_SEQUENCE = 256, 4
"""What a bound is evaluated on: the same sequences and the same draws for all arms."""
NUM_LOSSES, NUM_GRADIENTS = 40, 12
"""Draws for the variances of the loss and of its gradient."""
ARCHITECTURE = {"family": "llama", "width": 128, "num_layers": 4, "num_heads": 4}

Tree = JsonObject
"""A recipe as the mapping that YAML gives."""


def recipe_tree(objective: Tree, steps: int) -> Tree:
    """Return a recipe without its network, its data and its seed."""
    return {
        "name": "study",
        "objective": objective,
        "optimizer": {
            "learning_rate": LEARNING_RATE,
            "betas": [0.9, 0.98],
            "weight_decay": 0.03,
            "warmup_steps": min(30, steps // 4),
            "lr_schedule": "cosine",
        },
        "ema": {"decay": 0.98},
        "training": {"steps": steps, "global_batch_size": BATCH_SIZE, "micro_batch_size": BATCH_SIZE},
        "validation": {"sequences": 0},
        "checkpoint": {"every_steps": steps, "keep_last": 1},
        "tracking": {"log_every_steps": 20},
    }


def complete_recipe(tree: Mapping[str, Any], name: str, data: str, model: Tree, seed: int = 0) -> Recipe:
    """Return the recipe of a run.

    Args:
        tree: a recipe without its network, its data and its seed.
        name: the name of the run in error messages.
        data: the data folder.
        model: the `model` section of the recipe.
        seed: the training seed.
    """
    return validate({**tree, "seed": seed, "model": model, "data": {"sources": [{"path": data}]}}, name)


def base_recipe(data: str) -> Recipe:
    """Return the recipe of the AR model that the runs start from."""
    architecture = {**ARCHITECTURE, "max_positions": SEQUENCE_LENGTH}
    tree = recipe_tree({"name": "autoregressive"}, BASE_STEPS)
    return complete_recipe(tree, "the base", data, {"architecture": architecture})


class Prepared(NamedTuple):
    """What the runs need."""

    corpus: Mapping[str, Any]
    """The fingerprint of the text: documents, characters, sha256."""
    data: str
    """The data folder."""
    base: str
    """The run directory of the AR model."""


def prepare(out: Path) -> Prepared:
    """Build the data and train the AR model in `out`, unless they exist."""
    corpus = text8.build_data(out / "text8", SEQUENCE_LENGTH)
    data, base = str(out / "text8" / "data"), str(out / "base")
    loop.fit(base_recipe(data), base)
    return Prepared(corpus, data, base)


@dataclass(frozen=True)
class TrainedRun:
    """A finished training run."""

    model: TextModel
    objective: Objective
    """The objective as it was trained, with its learned parameters."""
    result: Mapping[str, Any]
    """What `training.loop.fit` returned."""
    seconds: float

    def score(self, data: str) -> Scored:
        """Score held-out text with the draws that all arms share."""
        return self.model.score(data, max_sequences=HELD_OUT_SEQUENCES, draws_per_sequence=DRAWS_PER_SEQUENCE)

    def variances(self, data: str) -> dict[str, float]:
        """Return the variances of the training loss and its gradient on one training batch; see `draw_variances`."""
        return draw_variances(
            self.model,
            self.objective,
            read_split(data, "train", BATCH_SIZE),
            num_losses=NUM_LOSSES,
            num_gradients=NUM_GRADIENTS,
            seed=1,
        )


def train(recipe: Recipe, folder: Path) -> TrainedRun:
    """Train a run in `folder`, or resume it, and load its last checkpoint."""
    started = time.monotonic()
    result = loop.fit(recipe, folder)
    seconds = time.monotonic() - started
    model, checkpoint = load(folder), our_checkpoint(str(folder))
    assert checkpoint is not None, "a finished run has a checkpoint"
    return TrainedRun(model, trained_objective(checkpoint, model), result, seconds)


def scored_outcome(
    scored: Scored, metrics: Mapping[str, float | None], details: Mapping[str, Any] | None = None
) -> Outcome:
    """Return an outcome with the bits and the bytes of every document."""
    bits = scored.nats / math.log(2)
    return Outcome(metrics, bits.tolist(), scored.num_bytes.tolist(), details or {})


def argument_parser(study: str, doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that all studies have.

    Args:
        study: the name of the study's module.
        doc: the module's docstring, whose first line is the description.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m dlm_ray.evaluation.studies.{study}", description=(doc or "").splitlines()[0]
    )
    parser.add_argument(
        "--results",
        type=folder_argument,
        help="folder for the table, the figure and the numbers (default: with the runs)",
    )
    parser.add_argument("--minutes", type=float, help="start no run that would end later (default: no limit)")
    return parser


def add_training_arguments(parser: argparse.ArgumentParser, default_steps: int) -> None:
    """Add the options of the studies that train."""
    parser.add_argument(
        "--out",
        type=folder_argument,
        required=True,
        help="folder for the runs; rerun the same command to resume",
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of training seeds per arm (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=default_steps, help="training steps per run (default: %(default)s)"
    )
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, help="threads of torch (default: %(default)s)"
    )


def parse_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line and set the number of torch threads if it has that option."""
    arguments = parser.parse_args()
    if "threads" in arguments:
        torch.set_num_threads(arguments.threads)
    return arguments


def run_and_report(
    study: Study,
    run_arm: RunArm,
    out: Path,
    arguments: argparse.Namespace,
    notes: Callable[[Sequence[Record]], Sequence[str]],
) -> None:
    """Run what is missing, write the report, and print its files and the verdicts on the published orderings.

    Args:
        study: the arms and seeds.
        run_arm: runs one arm with one seed.
        out: the folder for the runs.
        arguments: `results` and `minutes` of the command line.
        notes: returns the report's paragraphs for the reader.
    """
    records = runner.run(study, run_arm, out, arguments.minutes, print_progress)
    paths = write_report(study, records, arguments.results or out, hardware(), notes(records))
    for verdict in judge_orderings(study, records):
        print_progress(f"{verdict.better} below {verdict.worse} ({verdict.source}): {verdict.verdict}")
    sys.stdout.write(json.dumps([str(path) for path in paths]) + "\n")


def hardware() -> str:
    """Return the machine of the runs, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores"


def print_progress(message: str) -> None:
    """Print a message to stderr."""
    print(message, file=sys.stderr, flush=True)
