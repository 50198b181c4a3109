"""The quickstart: corpus, data, an AR base, its adaptation, a control from scratch, bounds, samples, export, report."""

from __future__ import annotations

import datetime
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dlm_ray.config.load import load_recipe
from dlm_ray.config.paths import local_path
from dlm_ray.config.recipe import Recipe
from dlm_ray.runtime import cluster  # imported first: it sets the variables that Ray reads when it is imported

# isort: split
import torch

from dlm_ray.checkpoint.export import export
from dlm_ray.config.errors import UserError
from dlm_ray.data.corpus import CorpusFields, write_corpus
from dlm_ray.data.index import load_index
from dlm_ray.evaluation.generation import ngram_statistics
from dlm_ray.evaluation.text_baselines import unigram_score, xz_bits_per_byte
from dlm_ray.generation.loading import as_unadapted, load
from dlm_ray.generation.scoring import Scored
from dlm_ray.generation.text_model import TextModel
from dlm_ray.models import families
from dlm_ray.runtime.build import build
from dlm_ray.runtime.quickstart_report import INFILL_PREFIX, INFILL_SUFFIX, write_report
from dlm_ray.runtime.train import RunResult, fit

Show = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""


@dataclass(frozen=True)
class Size:
    """Sizes of all stages; a smoke test runs the same code with smaller ones."""

    corpus_bytes: int | None = None
    """All text on this machine if None."""
    vocab_size: int = 4096
    sequence_length: int = 256
    held_out: float = 0.03
    """Share of the documents."""
    evaluation_sequences: int = 200
    draws_per_sequence: int = 6
    num_samples: int = 100
    sample_tokens: int = 128
    sample_steps: int = 24
    infill_tokens: int = 24


SMOKE = Size(
    corpus_bytes=1_500_000,
    vocab_size=512,
    sequence_length=64,
    held_out=0.1,
    evaluation_sequences=400,
    draws_per_sequence=2,
    num_samples=8,
    sample_tokens=32,
    sample_steps=8,
    infill_tokens=8,
)
_SMOKE_OVERRIDES = [
    "training.steps=8",
    "training.global_batch_size=8",
    "training.micro_batch_size=4",
    "validation.every_steps=4",
    "validation.sequences=4",
    "checkpoint.every_steps=4",
    "tracking.log_every_steps=2",
]


def quickstart(
    out: Path, *, smoke: bool = False, overrides: Sequence[str] = (), show: Show = lambda stage, done, total: None
) -> dict[str, Any]:
    """Run all stages in `out` and write report.json and report.html there; the same call resumes an interrupted one.

    Args:
        out: gets corpus.jsonl, data/, runs/, export/ and the report.
        smoke: run every stage with a few steps.
        overrides: of the adaptation's recipe, such as `curriculum.annealing.pattern=window`; those of `training`,
            `optimizer`, `parallelism` and `seed` apply to the base and the control, too. `model.base=NAME` starts from
            a real checkpoint instead of training a base.
        show: called with progress.

    Returns:
        The content of report.json.

    Raises:
        UserError: if there is no corpus on this machine, or an override is invalid.
    """
    started = time.time()
    size = SMOKE if smoke else Size()
    out = local_path(out, "out").absolute()
    out.mkdir(parents=True, exist_ok=True)
    stages = _Stages(show)
    recipes = _recipes(out, size, smoke, overrides)
    corpus, runs, base = _prepare_and_train(stages, recipes, out, size)

    # Ray has stopped, so this process can use all cores.
    torch.set_num_threads(os.cpu_count() or 1)
    models = {"ar": load(base), "adapted": load(runs["adapted"].run_dir), "scratch": load(runs["scratch"].run_dir)}
    scored = _evaluate(stages, models, out, size)
    unigram = unigram_score(str(out / "data"), size.evaluation_sequences)
    report = {
        "date": datetime.date.today().isoformat(),
        "smoke": smoke,
        "hardware": _hardware(),
        "corpus": corpus,
        "base": "trained here" if "ar" in runs else base,
        **{name: score.as_dict() for name, score in scored.items()},
        "paired": {
            f"adapted_minus_{other}": scored["adapted"].minus(score)
            for other, score in {**scored, "unigram": unigram}.items()
            if other != "adapted"
        },
        "unigram_bits_per_byte": unigram.bits_per_byte,
        "xz_bits_per_byte": xz_bits_per_byte(str(out / "data"), size.evaluation_sequences),
        "train": _throughput(runs),
    }
    with stages.timed("samples"):
        report["samples"] = _samples(stages, models, out, size)
    with stages.timed("infill"):
        middle = models["adapted"].infill(
            INFILL_PREFIX, INFILL_SUFFIX, length_tokens=size.infill_tokens, temperature=0.5
        )[0]
        report["infill"] = {"prefix": INFILL_PREFIX, "written": middle, "suffix": INFILL_SUFFIX}
    with stages.timed("export"):
        report["checkpoint"] = runs["adapted"].checkpoint
        report["export"] = str(_export(runs["adapted"], out / "export"))
    report["seconds"] = {**stages.seconds, "in_all": round(time.time() - started, 1)}
    write_report(report, {name: run.run_dir for name, run in runs.items()}, out)
    return report


class _Stages:
    """Shows the progress of stages and measures their time."""

    def __init__(self, show: Show):
        self._show, self._stage = show, ""
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Run one stage within the context; its time counts only if it succeeds."""
        self._stage, entered = stage, time.time()
        self._show(stage, 0, 1)
        yield
        self.seconds[stage] = round(time.time() - entered, 1)
        self._show(stage, 1, 1)

    def progress(self, done: int, total: int) -> None:
        """Show the progress of the running stage."""
        self._show(self._stage, done, total)


def _prepare_and_train(
    stages: _Stages, recipes: dict[str, Recipe], out: Path, size: Size
) -> tuple[CorpusFields, dict[str, RunResult], str]:
    """Build the corpus and the data, and train the base, the adaptation and the control.

    Returns:
        A description of the corpus; the results of the runs; the base, which is in the runs as `ar` unless the user
        gave one.
    """
    with cluster.session():
        cluster.check_fits(recipes["adapted"].parallelism)
        with stages.timed("corpus"):
            corpus = write_corpus(str(out / "corpus.jsonl"), size.corpus_bytes)
        given_base = recipes["adapted"].model.base
        with stages.timed("data"):
            build(
                [str(out / "corpus.jsonl")],
                str(out / "data"),
                tokenizer=given_base,
                train_tokenizer_vocab=size.vocab_size if given_base is None else None,
                sequence_length=size.sequence_length,
                held_out=size.held_out,
                progress=stages.progress,
            )
        runs: dict[str, RunResult] = {}
        if given_base is None:
            runs["ar"] = _train(stages, "ar", recipes["ar"], out)
        base = given_base or str(runs["ar"].run_dir)
        runs["adapted"] = _train(stages, "adapted", _with_base(recipes["adapted"], base), out)
        scratch = recipes["scratch"]
        if given_base is not None:  # the control has the architecture of the base
            architecture = families.architecture_of(load(base).denoiser.network.config)
            model = scratch.model.model_copy(update={"architecture": architecture})
            scratch = scratch.model_copy(update={"model": model})
        runs["scratch"] = _train(stages, "scratch", scratch, out)
    return corpus, runs, base


def _recipes(out: Path, size: Size, smoke: bool, overrides: Sequence[str]) -> dict[str, Recipe]:
    """Return the three shipped recipes with the data of `out` and the overrides that apply to each."""
    shared = [
        override
        for override in overrides
        if override.partition(".")[0] in ("training", "optimizer", "parallelism") or override.startswith("seed=")
    ]
    shape = _SMOKE_OVERRIDES if smoke else []
    data = [f"data.sources=[{{path: {json.dumps(str(out / 'data'))}}}]"]
    recipes = {
        "ar": load_recipe("quickstart_base", [*shape, *data, *shared]),
        "adapted": load_recipe("quickstart", [*shape, *data, *overrides]),
        "scratch": load_recipe("quickstart_scratch", [*shape, *data, *shared]),
    }
    if recipes["adapted"].training.steps != recipes["scratch"].training.steps:
        raise UserError(
            "the control from scratch must train on as many tokens as the adaptation; training.steps differ"
        )
    if not any(override.startswith("model.base=") for override in overrides):
        recipes["adapted"] = _with_base(recipes["adapted"], None)  # until the base is trained
    return recipes


def _with_base(recipe: Recipe, base: str | None) -> Recipe:
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"base": base})})


def _train(stages: _Stages, name: str, recipe: Recipe, out: Path) -> RunResult:
    with stages.timed(f"train {name}"):
        return fit(recipe, out / "runs", on_event=lambda event: stages.progress(event["step"], recipe.training.steps))


def _evaluate(stages: _Stages, models: dict[str, TextModel], out: Path, size: Size) -> dict[str, Scored]:
    """Score all models on the same sequences and draws.

    The base before its adaptation is scored with causal and with bidirectional attention, and the better one counts.
    """

    def score(name: str, model: TextModel) -> Scored:
        with stages.timed(f"evaluate {name}"):
            return model.score(
                str(out / "data"),
                max_sequences=size.evaluation_sequences,
                draws_per_sequence=size.draws_per_sequence,
                progress=stages.progress,
            )

    scored = {name: score(name, model) for name, model in models.items()}
    patterns: tuple[Literal["causal", "bidirectional"], ...] = ("causal", "bidirectional")
    unadapted = [score(f"unadapted, {pattern}", as_unadapted(models["ar"], pattern)) for pattern in patterns]
    return {**scored, "unadapted": min(unadapted, key=lambda score: score.bits_per_byte)}


def _hardware() -> dict[str, Any]:
    return {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _throughput(runs: dict[str, RunResult]) -> dict[str, Any]:
    by_run = {
        name: {key: run.metrics[key] for key in ("tokens_per_second", "loss")} | {"steps": run.step}
        for name, run in runs.items()
    }
    return {"tokens_per_second": by_run["adapted"]["tokens_per_second"], "by_run": by_run}


def _samples(stages: _Stages, models: dict[str, TextModel], out: Path, size: Size) -> dict[str, Any]:
    """Return unconditional samples of the diffusion models, with their overlap with held-out text."""
    sequence_length = load_index(str(out / "data")).sequence_length
    result = {}
    for name in ("adapted", "scratch"):
        texts = models[name].sample(
            num_samples=size.num_samples,
            length_tokens=min(size.sample_tokens, sequence_length - 1),
            steps=size.sample_steps,
            rule="ancestral",
            on_step=lambda step, steps, canvas: stages.progress(step, steps),
        )
        result[name] = {**ngram_statistics(texts, models[name].tokenizer, str(out / "data")), "texts": texts[:3]}
    return result


def _export(run: RunResult, folder: Path) -> Path:
    """Export the run's checkpoint; an earlier export of the same checkpoint is kept."""
    marker = folder.with_suffix(".json")
    if folder.exists() and marker.exists() and json.loads(marker.read_text()) == run.checkpoint:
        return folder
    if folder.exists():
        raise UserError(f"{folder} has the export of another run; choose another `out`, or remove it")
    exported = export(run.checkpoint, str(folder))
    marker.write_text(json.dumps(run.checkpoint))
    return exported
