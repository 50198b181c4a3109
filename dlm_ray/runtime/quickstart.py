"""The whole main job on one machine: corpus, shards, an AR base, its adaptation, a control from scratch, bounds, samples, export, a report."""

from __future__ import annotations

import datetime
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlm_ray.config.load import load_recipe
from dlm_ray.config.paths import local_path
from dlm_ray.config.recipe import Recipe
from dlm_ray.runtime import cluster  # before anything that imports Ray: it sets what Ray reads then

# isort: split
import torch

from dlm_ray.checkpoint.export import export
from dlm_ray.config.errors import UserError
from dlm_ray.data.corpus import write_corpus
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
"""Called with (what is going on, done, total)."""


@dataclass(frozen=True)
class Size:
    """How much of everything; a smoke test runs the same code with less."""

    corpus_bytes: int | None = None
    vocab_size: int = 4096
    sequence_length: int = 256
    held_out: float = 0.03
    evaluation_rows: int = 200
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
    evaluation_rows=400,
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
    out: Path, *, smoke: bool = False, overrides: Sequence[str] = (), show: Show = lambda what, done, total: None
) -> dict[str, Any]:
    """Does the main job in `out` and writes report.json and report.html there. The same call goes on where an interrupted one stopped.

    Args:
        out: gets corpus.jsonl, data/, runs/, export/ and the report.
        smoke: a few steps of everything.
        overrides: of the recipe of the adaptation, such as `curriculum.annealing.pattern=window`; those of `training`,
        `optimizer`, `parallelism`
            and `seed` hold for the base and the control, too. `model.base=NAME` starts from a real checkpoint instead of training a base.
        show: told of progress.

    Raises:
        UserError: if there is no corpus on this machine, or an override is wrong.
    """
    started = time.time()
    size = SMOKE if smoke else Size()
    out = local_path(out, "--out").absolute()
    out.mkdir(parents=True, exist_ok=True)
    stages = _Stages(show)
    recipes = _recipes(out, size, smoke, overrides)

    with cluster.session():
        cluster.check_fits(recipes["adapted"].parallelism)
        with stages.timed("corpus"):
            corpus = write_corpus(str(out / "corpus.jsonl"), size.corpus_bytes)
        base = recipes["adapted"].model.base
        own_base = base is None
        with stages.timed("data"):
            build(
                [str(out / "corpus.jsonl")],
                str(out / "data"),
                tokenizer=base,
                train_tokenizer_vocab=size.vocab_size if own_base else None,
                sequence_length=size.sequence_length,
                held_out=size.held_out,
                progress=stages.progress,
            )
        runs: dict[str, RunResult] = {}
        if own_base:
            runs["ar"] = _train(stages, "ar", recipes["ar"], out)
            base = str(runs["ar"].run_dir)
        runs["adapted"] = _train(stages, "adapted", _with_base(recipes["adapted"], base), out)
        base_model = load(str(base))
        scratch = recipes["scratch"]
        if not own_base:
            architecture = families.architecture_of(base_model.denoiser.network.config)
            scratch = scratch.model_copy(
                update={"model": scratch.model.model_copy(update={"architecture": architecture})}
            )
        runs["scratch"] = _train(stages, "scratch", scratch, out)

    # Training is over and Ray is gone: from here on this process has all cores.
    torch.set_num_threads(os.cpu_count() or 1)
    models = {"ar": base_model, "adapted": load(runs["adapted"].run_dir), "scratch": load(runs["scratch"].run_dir)}
    scored = _evaluate(stages, models, out, size)
    unigram = unigram_score(str(out / "data"), size.evaluation_rows)
    report = {
        "date": datetime.date.today().isoformat(),
        "smoke": smoke,
        "hardware": {
            "machine": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "corpus": corpus,
        "base": "trained here" if own_base else str(base),
        **{name: score.as_dict() for name, score in scored.items()},
        "paired": {
            f"adapted_minus_{other}": scored["adapted"].minus(one)
            for other, one in {**scored, "unigram": unigram}.items()
            if other != "adapted"
        },
        "unigram_bits_per_byte": unigram.bits_per_byte,
        "xz_bits_per_byte": xz_bits_per_byte(str(out / "data"), size.evaluation_rows),
        "train": _training(runs),
    }
    with stages.timed("samples"):
        report["samples"] = _samples(stages, models, out, size)
    with stages.timed("infill"):
        written = models["adapted"].infill(
            INFILL_PREFIX, INFILL_SUFFIX, length_tokens=size.infill_tokens, temperature=0.5
        )[0]
        report["infill"] = {"prefix": INFILL_PREFIX, "written": written, "suffix": INFILL_SUFFIX}
    with stages.timed("export"):
        report["checkpoint"] = runs["adapted"].checkpoint
        report["export"] = str(_export(runs["adapted"], out / "export"))
    report["seconds"] = {**stages.seconds, "in_all": round(time.time() - started, 1)}
    write_report(report, {name: run.run_dir for name, run in runs.items()}, out)
    return report


class _Stages:
    """Names the stage in progress messages, and remembers how long each took."""

    def __init__(self, show: Show):
        self._show, self._stage = show, ""
        self.seconds: dict[str, float] = {}

    def timed(self, stage: str) -> _Stages:
        """A context for one stage."""
        self._stage = stage
        return self

    def progress(self, done: int, total: int) -> None:
        """Within a stage."""
        self._show(self._stage, done, total)

    def __enter__(self) -> None:
        self._entered = time.time()
        self._show(self._stage, 0, 1)

    def __exit__(self, kind: Any, *_: object) -> None:
        self.seconds[self._stage] = round(time.time() - self._entered, 1)
        if kind is None:
            self._show(self._stage, 1, 1)


def _recipes(out: Path, size: Size, smoke: bool, overrides: Sequence[str]) -> dict[str, Recipe]:
    """The three shipped recipes, pointed at `out`, with the overrides that concern each."""
    shared = [
        one
        for one in overrides
        if one.partition(".")[0] in ("training", "optimizer", "parallelism") or one.startswith("seed=")
    ]
    shape = _SMOKE_OVERRIDES if smoke else []
    data = [f"data.sources=[{{path: {json.dumps(str(out / 'data'))}}}]"]
    recipes = {
        "ar": load_recipe("quickstart_base", [*shape, *data, *shared]),
        "adapted": load_recipe("quickstart", [*shape, *data, *overrides]),
        "scratch": load_recipe("quickstart_scratch", [*shape, *data, *shared]),
    }
    if recipes["adapted"].training.steps != recipes["scratch"].training.steps:
        raise UserError("the control from scratch has to see as many tokens as the adaptation: training.steps differ")
    if not any(one.startswith("model.base=") for one in overrides):
        # Filled in when the base is trained; until then the recipe says nothing.
        recipes["adapted"] = _with_base(recipes["adapted"], None)
    return recipes


def _with_base(recipe: Recipe, base: str | None) -> Recipe:
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"base": base})})


def _train(stages: _Stages, name: str, recipe: Recipe, out: Path) -> RunResult:
    with stages.timed(f"train {name}"):
        return fit(recipe, out / "runs", on_event=lambda event: stages.progress(event["step"], recipe.training.steps))


def _evaluate(stages: _Stages, models: dict[str, TextModel], out: Path, size: Size) -> dict[str, Scored]:
    """The same rows and draws for all; of the base before adaptation, whichever visibility serves it better."""

    def score(name: str, model: TextModel) -> Scored:
        with stages.timed(f"evaluate {name}"):
            return model.score(
                str(out / "data"),
                max_sequences=size.evaluation_rows,
                draws_per_sequence=size.draws_per_sequence,
                progress=stages.progress,
            )

    scored = {name: score(name, model) for name, model in models.items()}
    unadapted = [
        score(f"unadapted, {pattern}", as_unadapted(models["ar"], pattern)) for pattern in ("causal", "bidirectional")
    ]
    return {**scored, "unadapted": min(unadapted, key=lambda one: one.bits_per_byte)}


def _training(runs: dict[str, RunResult]) -> dict[str, Any]:
    by_run = {
        name: {key: run.metrics[key] for key in ("tokens_per_second", "loss")} | {"steps": run.step}
        for name, run in runs.items()
    }
    return {"tokens_per_second": by_run["adapted"]["tokens_per_second"], "by_run": by_run}


def _samples(stages: _Stages, models: dict[str, TextModel], out: Path, size: Size) -> dict[str, Any]:
    """Texts from nothing by the diffusion models, and how much of them stands in held-out text."""
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
    """The export of this very checkpoint: one that lies there from an earlier call is kept if it is of the same."""
    marker = folder.with_suffix(".json")
    if folder.exists() and marker.exists() and json.loads(marker.read_text()) == run.checkpoint:
        return folder
    if folder.exists():
        raise UserError(f"{folder} holds the export of another run; choose another --out, or remove it")
    written = export(run.checkpoint, str(folder))
    marker.write_text(json.dumps(run.checkpoint))
    return written
