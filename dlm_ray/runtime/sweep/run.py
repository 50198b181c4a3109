"""`dlm-ray sweep`: data, a base, the trials, their measurement at common draws, a longer run of the best, and the report; resumable."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dlm_ray.runtime import cluster  # first of all: it sets what Ray reads when it is imported

# isort: split
import ray

from dlm_ray.checkpoint import listing
from dlm_ray.checkpoint.description import check_restorable
from dlm_ray.config import space as spaces
from dlm_ray.config.errors import UserError
from dlm_ray.config.load import dump
from dlm_ray.config.paths import local_path
from dlm_ray.config.recipe import Recipe
from dlm_ray.config.space import Settings
from dlm_ray.config.sweep_load import Loaded, start_recipe
from dlm_ray.data.corpus import write_corpus
from dlm_ray.data.index import load_index
from dlm_ray.evaluation.sweeps import report
from dlm_ray.evaluation.sweeps.measure import measure
from dlm_ray.evaluation.sweeps.ranking import TrialResult, best, ranked
from dlm_ray.runtime.build import build
from dlm_ray.runtime.sweep import tuning
from dlm_ray.runtime.sweep.search import Listed, Tpe
from dlm_ray.runtime.sweep.tuning import Plan, Trial
from dlm_ray.runtime.train import check_before_starting, fit, with_absolute_paths

Emit = Callable[[str], None]
# Where a sweep runs and how many trials at once does not change what it asks.
_NOT_ASKED = ("trials_at_once",)


def sweep(loaded: Loaded, out: Path, *, resume: bool = False, emit: Emit = lambda message: None) -> dict[str, Any]:
    """Runs a sweep in `out` and writes results.parquet, results.json, report.html and best.yaml there.

    Args:
        loaded: from `load_sweep`.
        out: also gets data/, base/, trials/ and confirmed/; workers on other machines must see the same path.
        resume: goes on with the sweep that `out` holds: trials that had ended are kept but for failed ones, others go on from their checkpoints.
        say: told of progress.

    Raises:
        UserError: if `out` holds a sweep and it is another one or `resume` is False, or if the trials do not fit data, base or cluster.
    """
    started = time.monotonic()
    out = local_path(out, "--out").absolute()
    _claim(loaded, out, resume)
    with cluster.session():
        plan = _prepare(loaded, out, emit)
        ended = _run(plan, out, emit)
        rows = _measured(plan, ended, emit)
        found = ranked(rows, loaded.sweep.metric, loaded.sweep.rank_by)
        confirmed = _confirmed(plan, best(found), out, emit) if loaded.sweep.confirm else []
    written = report.write(loaded.sweep, found, confirmed, out, time.monotonic() - started)
    # A confirming run may fail; what it was to confirm is still the answer.
    written += _write_best(plan, [row for row in confirmed if row.measured] or best(found), out)
    fields = {
        "trials": [report.fields_of(one) for one in found],
        "confirmed": [row.measured.get("bits_per_byte") for row in confirmed],
    }
    return {**fields, "files": [str(path) for path in written], "seconds": round(time.monotonic() - started, 1)}


def _claim(loaded: Loaded, out: Path, resume: bool) -> None:
    """Notes what `out` is the answer to, or compares."""
    asked = {
        "sweep": loaded.sweep.model_dump(mode="json", exclude=set(_NOT_ASKED)),
        "recipe": loaded.tree,
    }
    note = out / "sweep.json"
    if note.exists():
        before = json.loads(note.read_text())
        changed = _changes(before, json.loads(json.dumps(asked)))
        if not resume:
            raise UserError(f"{out} holds a sweep already; --resume goes on with it, or choose another --out")
        if changed:
            raise UserError(f"{out} holds another sweep: {'; '.join(changed)}; ask the same, or choose another --out")
        return
    out.mkdir(parents=True, exist_ok=True)
    partial = note.with_suffix(".tmp")
    partial.write_text(json.dumps(asked, indent=1))
    os.replace(partial, note)


def _changes(before: Any, now: Any, path: str = "") -> list[str]:
    """Where two trees differ: `a.b was 1 and is 2`."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(key for key in now if key not in before)]
        return [
            one for key in keys for one in _changes(before.get(key), now.get(key), f"{path}.{key}" if path else key)
        ]
    return [] if before == now else [f"{path.removeprefix('sweep.')} was {json.dumps(before)} and is {json.dumps(now)}"]


def _prepare(loaded: Loaded, out: Path, emit: Emit) -> Plan:
    """What all trials need, and that they fit it: nothing is trained before the cluster is seen to have room."""
    own = loaded.sweep
    recipes = [loaded.recipe(settings) for settings in spaces.corners(own.space, 10_000)]
    tuning.check_fits(recipes, own.trials_at_once)
    data = base = None
    if own.corpus is not None:
        data = str(out / "data")
        if not (out / "data" / "index.json").exists():
            emit("building the data")
            write_corpus(str(out / "corpus.jsonl"), own.corpus.max_bytes)
            shape: dict[str, Any] = {
                "sequence_length": own.corpus.sequence_length,
                "held_out": own.corpus.held_out,
                "train_tokenizer_vocab": own.corpus.vocab_size,
            }
            build([str(out / "corpus.jsonl")], data, **shape)
    if own.start_from is not None:
        recipe = start_recipe(own, data)
        cluster.check_fits(recipe.parallelism)
        emit(f"the base that all trials start from: {recipe.training.steps} steps")
        base = str(fit(recipe, out / "base").run_dir)
    plan = Plan(loaded, str(out), load_index(data or recipes[0].data.sources[0].path).sequence_length, data, base)
    for settings in spaces.corners(own.space, 10_000):
        try:
            check_restorable(
                plan.recipe(settings).objective.name, "a trial"
            )  # or it could not be measured when it has ended
            check_before_starting(plan.recipe(settings))
        except UserError as error:
            raise UserError(f"{own.name} with {spaces.label(settings)}: {error}") from error
    return replace(plan, loaded=replace(loaded, tree=_tree_with_absolute_paths(plan)))


def _tree_with_absolute_paths(plan: Plan) -> dict[str, Any]:
    """The recipe's tree with absolute paths: drivers run in folders of their own."""
    tree = json.loads(json.dumps(plan.loaded.tree))
    for source in tree.get("data", {}).get("sources", []):
        source["path"] = source["path"] if "://" in source["path"] else str(Path(source["path"]).absolute())
    base = tree.get("model", {}).get("base")
    if base and Path(base).exists():
        tree["model"]["base"] = str(Path(base).absolute())
    return tree


def _run(plan: Plan, out: Path, emit: Emit) -> list[Trial]:
    """All trials, those of an earlier call included."""
    own = plan.loaded.sweep
    ledger = out / "trials.jsonl"
    ended = _read(ledger)
    begun = {
        int(note.parent.name): json.loads(note.read_text())["settings"]
        for note in sorted((out / "trials").glob("*/trial.json"))
    }

    def on_trial(trial: Trial) -> None:
        with ledger.open("a") as lines:
            lines.write(json.dumps(asdict(trial)) + "\n")
        ended[trial.number] = trial
        emit(
            f"trial {trial.number}, {spaces.label(trial.settings)}: {trial.status} at step {trial.step}"
            + (f", {trial.reason}" if trial.reason else "")
        )
        for clone in trial.clones:
            emit(
                f"trial {trial.number} went on as a copy of trial {clone['from']} at step {clone['step']}, with {spaces.label(clone['settings'])}"
            )

    known = {number: trial for number, trial in ended.items() if trial.status != "failed"}
    if own.search.name == "optuna":
        total = own.search.trials or 0
        values = [(trial.settings, _last_bound(trial)) for trial in ended.values() if trial.settings]
        unfinished = [(number, settings) for number, settings in begun.items() if number not in ended]
        first = max([*begun, *ended, -1]) + 1
        searcher: Listed = Tpe(own, values, unfinished, first)
        num_trials = total - len(ended)
    else:
        # A member of a population goes on with the settings that it had come to.
        listed = [
            (number, begun.get(number, settings) if own.scheduler.name == "pbt" else settings)
            for number, settings in enumerate(spaces.trials(own))
        ]
        retold = own.scheduler.name in ("asha", "median") and len(known) < len(listed)
        chosen = [one for one in listed if one[0] in known and retold] + [one for one in listed if one[0] not in known]
        searcher, num_trials = Listed(chosen), len(chosen)
    if num_trials > 0:
        emit(f"{num_trials} trials, {own.trials_at_once} at once")
        tuning.run(plan, searcher, num_trials, known, on_trial)
    return [ended[number] for number in sorted(ended)]


def _read(ledger: Path) -> dict[int, Trial]:
    """The trials that ended, the last line of each; a line that a kill cut short is left out."""
    if not ledger.exists():
        return {}
    text = ledger.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        ledger.write_text(whole)
    return {fields["number"]: Trial(**fields) for fields in map(json.loads, whole.splitlines())}


def _last_bound(trial: Trial) -> float | None:
    latest = listing.latest(trial.run_dir) if trial.run_dir and trial.status != "failed" else None
    if latest is None:
        return None
    from dlm_ray.checkpoint.commit import read_manifest

    bound: float = read_manifest(latest).extra["metrics"]["validation"][tuning.METRIC]
    return bound


def _measured(plan: Plan, trials: Sequence[Trial], emit: Emit) -> list[TrialResult]:
    """Every trial that has a checkpoint, measured once each, as tasks of the cluster."""
    waiting: dict[Any, Trial] = {}
    answers: dict[int, dict[str, Any]] = {}
    for trial in trials:
        latest = listing.latest(trial.run_dir) if trial.run_dir else None
        note = plan.folder(trial.number) / "measured.json"
        if note.exists() and latest is not None:
            found = json.loads(note.read_text())
            if found["checkpoint"] == latest:
                answers[trial.number] = found
                continue
        if latest is not None and trial.status != "failed":
            waiting[_task(plan, trial)] = trial
    while waiting:
        [done], _ = ray.wait(list(waiting), num_returns=1)
        trial = waiting.pop(done)
        text = json.dumps({**ray.get(done), "checkpoint": listing.latest(trial.run_dir)})
        (plan.folder(trial.number) / "measured.json").write_text(text)
        answers[trial.number] = found = json.loads(text)  # as a sweep that goes on will read it
        emit(f"measured trial {trial.number}: {found['bits_per_byte']:.4f} bits per byte")
    return [_row(plan, trial, answers.get(trial.number, {})) for trial in trials]


def _task(plan: Plan, trial: Trial) -> Any:
    recipe = plan.recipe(trial.settings)
    on_gpu = recipe.parallelism.device != "cpu" and ray.cluster_resources().get("GPU", 0) >= 1
    data = recipe.data.sources[0].path
    options = {"num_cpus": recipe.parallelism.cpus_per_worker, "num_gpus": int(on_gpu), "max_retries": 1}
    return ray.remote(measure).options(**options).remote(trial.run_dir, plan.loaded.sweep.measure, data)


def _row(plan: Plan, trial: Trial, measured: dict[str, Any]) -> TrialResult:
    curve = tuning.curve(Path(trial.run_dir), plan, plan.recipe(trial.settings)) if trial.run_dir else []
    return TrialResult(
        trial.number,
        trial.settings,
        trial.status,
        trial.reason,
        trial.step,
        trial.run_dir,
        trial.clones,
        curve,
        measured,
    )


def _confirmed(plan: Plan, winners: Sequence[TrialResult], out: Path, emit: Emit) -> list[TrialResult]:
    """A longer run of the best of every group, measured as the trials were."""
    own = plan.loaded.sweep
    assert own.confirm is not None, "asked for"
    longer = replace(plan, overrides=own.confirm.overrides)
    trials: dict[int, Trial] = {}
    listed: list[tuple[int, Settings]] = [(row.number, dict(row.settings)) for row in winners]
    emit(f"confirming {len(listed)} with {', '.join(own.confirm.overrides)}")
    tuning.run(longer, Listed(listed), len(listed), {}, lambda trial: trials.update({trial.number: trial}))
    return _measured(longer, [trials[number] for number in sorted(trials)], emit)


def _write_best(plan: Plan, winners: Sequence[TrialResult], out: Path) -> list[Path]:
    """best.yaml, and one of each group where trials were compared in groups; `dlm-ray train` takes them as they are."""
    own = plan.loaded.sweep
    good = [row for row in winners if row.status == "finished"]
    if not good:
        return []
    # Between groups a variance does not compare; the bound does.
    metric = "bits_per_byte" if own.rank_by else own.metric
    sign = -1 if metric == "tokens_per_second" else 1
    good.sort(key=lambda row: sign * row.measured[metric])
    files = {"best.yaml": good[0]}
    if own.rank_by:
        files |= {f"best-{row.group(own.rank_by)}.yaml": row for row in good}
    for name, row in files.items():
        (out / name).write_text(f"# {own.name}: {row.name}\n" + dump(_ordinary(plan.recipe(dict(row.settings)))))
    return [out / name for name in files]


def _ordinary(recipe: Recipe) -> Recipe:
    """Without what only a trial needs."""
    recipe = with_absolute_paths(recipe)
    return recipe.model_copy(update={"tracking": recipe.tracking.model_copy(update={"group": None})})
