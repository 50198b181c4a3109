"""Run a sweep: data, base, trials, their measurement, a longer run of the best, and the report; resumable."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypedDict

from dlm_ray.runtime import cluster  # imported first: it sets the variables that Ray reads when it is imported

# isort: split
from dlm_ray.checkpoint import listing
from dlm_ray.checkpoint.manifest import read_manifest
from dlm_ray.config import space as spaces
from dlm_ray.config.errors import UserError
from dlm_ray.config.load import dump
from dlm_ray.config.manifest_fields import JsonObject
from dlm_ray.config.paths import local_path
from dlm_ray.config.recipe import Recipe
from dlm_ray.config.space import Settings
from dlm_ray.config.sweep_load import Loaded, start_recipe
from dlm_ray.config.trees import differences, with_absolute_paths
from dlm_ray.data.corpus import write_corpus
from dlm_ray.data.index import load_index
from dlm_ray.evaluation.sweeps import report
from dlm_ray.evaluation.sweeps.ranking import TrialResult, best, ranked
from dlm_ray.runtime.build import build
from dlm_ray.runtime.events import complete_lines
from dlm_ray.runtime.sweep import tuning
from dlm_ray.runtime.sweep.measurement import measured
from dlm_ray.runtime.sweep.plan import METRIC, Plan, Trial
from dlm_ray.runtime.sweep.search import Listed, Tpe
from dlm_ray.runtime.train import check_before_starting, fit

Emit = Callable[[str], None]
"""Called with a progress message."""

_MAX_CORNERS = 10_000
# Keys that do not change the answer of a sweep: it may be resumed with others.
_NOT_IN_ANSWER = {"trials_at_once"}


class SweepResult(TypedDict):
    """The results of a sweep."""

    trials: list[JsonObject]
    """The trials, the best first; the fields of `results.json`."""
    confirmed: list[float | None]
    """Bits per byte of the confirming runs."""
    files: list[str]
    """The files that were written."""
    seconds: float


def sweep(loaded: Loaded, out: Path, *, resume: bool = False, emit: Emit = lambda message: None) -> SweepResult:
    """Run a sweep in `out` and write results.parquet, results.json, report.html and best.yaml there.

    Args:
        loaded: from `load_sweep`.
        out: also gets data/, base/, trials/ and confirmed/; workers on other machines must see the same path.
        resume: resume the sweep in `out`: ended trials are kept unless they failed; the others resume from their
            checkpoints.
        emit: called with progress messages.

    Returns:
        The results, and the files that were written.

    Raises:
        UserError: if `out` has a sweep and it is a different one or `resume` is False, or if the trials do not fit the
            data, the base or the cluster.
    """
    started = time.monotonic()
    out = local_path(out, "out").absolute()
    _claim(loaded, out, resume)
    with cluster.session():
        plan = _prepare(loaded, out, emit)
        results = measured(plan, _run(plan, out, emit), emit)
        ranking = ranked(results, loaded.sweep.metric, loaded.sweep.rank_by)
        confirmed = _confirmed(plan, best(ranking), emit) if loaded.sweep.confirm else []
    files = report.write(loaded.sweep, ranking, confirmed, out, time.monotonic() - started)
    # If the confirming run failed, the trial that it should have confirmed is still the answer.
    files += _write_best(plan, [result for result in confirmed if result.measured] or best(ranking), out)
    return {
        "trials": [report.fields_of(entry) for entry in ranking],
        "confirmed": [result.measured.get("bits_per_byte") for result in confirmed],
        "files": [str(path) for path in files],
        "seconds": round(time.monotonic() - started, 1),
    }


def _claim(loaded: Loaded, out: Path, resume: bool) -> None:
    """Note in `out` which sweep it belongs to, or compare with the note."""
    question = {
        "sweep": loaded.sweep.model_dump(mode="json", exclude=_NOT_IN_ANSWER),
        "recipe": loaded.tree,
    }
    note = out / "sweep.json"
    if not note.exists():
        out.mkdir(parents=True, exist_ok=True)
        partial = note.with_suffix(".tmp")
        partial.write_text(json.dumps(question, indent=1))
        os.replace(partial, note)
        return
    if not resume:
        raise UserError(f"{out} has a sweep already; resume it with `resume`, or choose another `out`")
    changes = [
        f"{key.removeprefix('sweep.')} was {old} and is {new}"
        for key, old, new in differences(json.loads(note.read_text()), json.loads(json.dumps(question)))
    ]
    if changes:
        raise UserError(f"{out} has a different sweep: {'; '.join(changes)}; change it back, or choose another `out`")


def _prepare(loaded: Loaded, out: Path, emit: Emit) -> Plan:
    """Build the data and train the base, if the sweep does so, and check that all trials fit them and the cluster."""
    config = loaded.sweep
    corners = spaces.corners(config.space, _MAX_CORNERS)
    recipes = [loaded.recipe(settings) for settings in corners]
    tuning.check_fits(recipes, config.trials_at_once)
    data = _build_corpus(loaded, out, emit)
    base = None
    if config.start_from is not None:
        recipe = start_recipe(config, data)
        cluster.check_fits(recipe.parallelism)
        emit(f"training the base of all trials: {recipe.training.steps} steps")
        base = str(fit(recipe, out / "base").run_dir)
    plan = Plan(loaded, str(out), load_index(data or recipes[0].data.sources[0].path).sequence_length, data, base)
    for settings in corners:
        recipe = plan.recipe(settings)
        try:
            check_before_starting(recipe)
        except UserError as error:
            raise UserError(f"{config.name} with {spaces.label(settings)}: {error}") from error
    # Drivers run in other working directories.
    return replace(plan, loaded=replace(loaded, tree=with_absolute_paths(loaded.tree)))


def _build_corpus(loaded: Loaded, out: Path, emit: Emit) -> str | None:
    """Return the folder of the sweep's own data, which is built if need be; None if the sweep builds none."""
    corpus, folder = loaded.sweep.corpus, out / "data"
    if corpus is None:
        return None
    if not (folder / "index.json").exists():
        emit("building the data")
        write_corpus(str(out / "corpus.jsonl"), corpus.max_bytes)
        build(
            [str(out / "corpus.jsonl")],
            str(folder),
            sequence_length=corpus.sequence_length,
            held_out=corpus.held_out,
            train_tokenizer_vocab=corpus.vocab_size,
        )
    return str(folder)


def _run(plan: Plan, out: Path, emit: Emit) -> list[Trial]:
    """Run the trials that have not ended yet and return all trials, those of an earlier call included."""
    ledger = out / "trials.jsonl"
    ended = _read_ledger(ledger)
    known = {number: trial for number, trial in ended.items() if trial.status != "failed"}
    searcher, num_trials = _searcher(plan, ended, known, _begun(out))

    def on_trial(trial: Trial) -> None:
        with ledger.open("a") as lines:
            lines.write(json.dumps(asdict(trial)) + "\n")
        ended[trial.number] = trial
        reason = f", {trial.reason}" if trial.reason else ""
        emit(f"trial {trial.number}, {spaces.label(trial.settings)}: {trial.status} at step {trial.step}{reason}")
        for clone in trial.clones:
            emit(
                f"trial {trial.number} went on as a copy of trial {clone['from']} at step {clone['step']}, with "
                f"{spaces.label(clone['settings'])}"
            )

    if num_trials > 0:
        emit(f"{num_trials} trials, {plan.loaded.sweep.trials_at_once} at once")
        tuning.run(plan, searcher, num_trials, known, on_trial)
    return [ended[number] for number in sorted(ended)]


def _begun(out: Path) -> dict[int, Settings]:
    """Return the settings of all trials that have begun, by number."""
    notes = sorted((out / "trials").glob("*/trial.json"))
    return {int(note.parent.name): json.loads(note.read_text())["settings"] for note in notes}


def _searcher(
    plan: Plan, ended: dict[int, Trial], known: dict[int, Trial], begun: dict[int, Settings]
) -> tuple[Listed, int]:
    """Return what suggests the trials of this call, and how many there are.

    Args:
        plan: of the sweep.
        ended: trials that ended in an earlier call.
        known: those of them that did not fail.
        begun: settings of trials that had begun.
    """
    config = plan.loaded.sweep
    if config.search.name == "optuna":
        values = [(trial.settings, _last_bound(trial)) for trial in ended.values() if trial.settings]
        unfinished = [(number, settings) for number, settings in begun.items() if number not in ended]
        first = max([*begun, *ended, -1]) + 1
        return Tpe(config, values, unfinished, first), (config.search.trials or 0) - len(ended)
    # A member of a population resumes with the settings that it had reached.
    is_pbt = config.scheduler.name == "pbt"
    trials = [
        (number, begun.get(number, settings) if is_pbt else settings)
        for number, settings in enumerate(spaces.trials(config))
    ]
    # A scheduler that compares trials gets the reports of the known ones first.
    is_repeated = config.scheduler.name in ("asha", "median") and len(known) < len(trials)
    repeated = [trial for trial in trials if trial[0] in known and is_repeated]
    suggested = repeated + [trial for trial in trials if trial[0] not in known]
    return Listed(suggested), len(suggested)


def _read_ledger(ledger: Path) -> dict[int, Trial]:
    """Return the ended trials, each from its last line; remove an incomplete line of a killed sweep from the file."""
    lines, _ = complete_lines(ledger)
    complete = "".join(f"{line}\n" for line in lines)
    if ledger.exists() and ledger.read_text() != complete:
        ledger.write_text(complete)
    return {fields["number"]: Trial(**fields) for fields in map(json.loads, lines)}


def _last_bound(trial: Trial) -> float | None:
    """Return the last validation bound of a trial; None if it failed."""
    latest = listing.latest(trial.run_dir) if trial.run_dir and trial.status != "failed" else None
    if latest is None:
        return None
    return read_manifest(latest).extra["metrics"]["validation"][METRIC]


def _confirmed(plan: Plan, winners: Sequence[TrialResult], emit: Emit) -> list[TrialResult]:
    """Run the best trial of every group longer, and measure it as the trials were measured."""
    confirm = plan.loaded.sweep.confirm
    assert confirm is not None, "called only if the sweep confirms"
    longer = replace(plan, overrides=confirm.overrides)
    trials: dict[int, Trial] = {}
    listed: list[tuple[int, Settings]] = [(winner.number, dict(winner.settings)) for winner in winners]
    emit(f"confirming {len(listed)} with {', '.join(confirm.overrides)}")
    tuning.run(longer, Listed(listed), len(listed), {}, lambda trial: trials.update({trial.number: trial}))
    return measured(longer, [trials[number] for number in sorted(trials)], emit)


def _write_best(plan: Plan, winners: Sequence[TrialResult], out: Path) -> list[Path]:
    """Write best.yaml, and one recipe per group if trials were ranked in groups; `dlm-ray train` takes them."""
    config = plan.loaded.sweep
    finished = [result for result in winners if result.status == "finished"]
    if not finished:
        return []
    # Variances of different groups are not comparable; bounds are.
    metric = "bits_per_byte" if config.rank_by else config.metric
    sign = -1 if metric == "tokens_per_second" else 1
    finished.sort(key=lambda result: sign * result.measured[metric])
    files = {"best.yaml": finished[0]}
    if config.rank_by:
        files |= {f"best-{result.group(config.rank_by)}.yaml": result for result in finished}
    for name, result in files.items():
        recipe = _without_trial_settings(plan.recipe(dict(result.settings)))
        (out / name).write_text(f"# {config.name}: {result.name}\n" + dump(recipe))
    return [out / name for name in files]


def _without_trial_settings(recipe: Recipe) -> Recipe:
    """Return the recipe with absolute paths and without the tracking group, which is for trials only."""
    recipe = Recipe.model_validate(with_absolute_paths(recipe.model_dump(mode="json")))
    return recipe.model_copy(update={"tracking": recipe.tracking.model_copy(update={"group": None})})
