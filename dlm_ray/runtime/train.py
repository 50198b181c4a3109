"""A recipe on Ray Train: starts the workers, restarts them from the last checkpoint after a failure, and follows the run's metrics."""

from __future__ import annotations

import json
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dlm_ray.checkpoint import commit, listing
from dlm_ray.config.errors import DamageError, Stopped, StorageError, UserError
from dlm_ray.config.load import dump, run_name
from dlm_ray.config.paths import local_path
from dlm_ray.config.recipe import Elastic, Parallelism, Recipe
from dlm_ray.runtime import cluster  # first of all: it sets what Ray reads when it is imported

# isort: split
import ray
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.execution.context import get_train_context as get_internal_train_context
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError
from ray.train.v2.api.report_config import CheckpointUploadMode

from dlm_ray.data import storage
from dlm_ray.data.reading import open_sources
from dlm_ray.runtime.stream import ray_data_stream
from dlm_ray.training import guards, loop, setup, teacher

log = logging.getLogger(__name__)

OnEvent = Callable[[dict[str, Any]], None]

# The workers of a driver that was killed end by themselves, and write until then.
_PATIENCE_SECONDS = 60.0


@dataclass(frozen=True)
class RunResult:
    """Where a run lies, and how it ended."""

    run_dir: Path
    checkpoint: str
    step: int
    already_finished: bool
    metrics: dict[str, Any] = field(default_factory=dict)


def fit(recipe: Recipe, out: str | Path = "runs", *, fresh: bool = False, on_event: OnEvent | None = None) -> RunResult:
    """Runs the recipe to its end on Ray; the same call resumes a run that was interrupted, and tells a finished one at once.

    Args:
        recipe: the run.
        out: its directory is `<out>/<name>-<hash8>`; workers on other machines must see the same path.
        fresh: starts another run beside those that are there.
        on_event: called with every line of `metrics.jsonl` while the workers run.

    Raises:
        UserError: if the recipe does not fit the data, its base or the cluster, before any worker starts; or if the run is going on elsewhere.
        DamageError: if a shard or a checkpoint is damaged, or the disk is full. Neither is tried again.
        RuntimeError: if the workers failed more often than `parallelism.max_failures`, with the cause.
        Stopped: after SIGTERM, or once there is a file `stop` in the run directory; the state is committed, and the same call goes on.
    """
    run_dir = _run_dir(recipe, local_path(out, "--out").absolute(), fresh)
    finished = _finished(recipe, run_dir)
    if finished is not None:
        return finished
    check_before_starting(recipe)
    with guards.sole_owner(run_dir, "run"):
        (run_dir / "recipe.yaml").write_text(dump(recipe))
        # Which checkpoints there are is said by their manifests. Ray's own list may name pruned ones, and would then refuse to start.
        (run_dir / "checkpoint_manager_snapshot.json").unlink(missing_ok=True)
        (run_dir / guards.STOP_FILE).unlink(missing_ok=True)  # of a request that its run did not live to obey
        with cluster.session():
            cluster.check_fits(recipe.parallelism)
            with _followed(run_dir / "metrics.jsonl", on_event), _told_to_stop(run_dir):
                try:
                    _trainer(recipe, run_dir).fit()
                except TrainingFailedError as error:
                    raise _cause(error) from error
    result = _finished(recipe, run_dir)
    if result is None:
        latest = listing.latest(str(run_dir))
        assert latest is not None, f"Ray Train ended without an error, and {run_dir} holds no checkpoint"
        raise Stopped(
            f"the run was asked to stop before step {recipe.training.steps}; {latest} holds its state, and the same command goes on"
        )
    return RunResult(run_dir, result.checkpoint, result.step, already_finished=False, metrics=result.metrics)


def _trainer(recipe: Recipe, run_dir: Path) -> TorchTrainer:
    parallelism = recipe.parallelism
    use_gpu = parallelism.device == "cuda" or (
        parallelism.device == "auto" and ray.cluster_resources().get("GPU", 0) >= parallelism.fewest_workers
    )
    return TorchTrainer(
        _worker,
        train_loop_config={
            "recipe": with_absolute_paths(recipe).model_dump(mode="json"),
            "run_dir": str(run_dir),
            "device": "cuda" if use_gpu else "cpu",
        },
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=_scaling(parallelism, use_gpu),
        run_config=ray.train.RunConfig(
            name=run_dir.name,
            storage_path=str(run_dir.parent),
            failure_config=ray.train.FailureConfig(max_failures=parallelism.max_failures),
            callbacks=[_NotTriedAgain()],  # type: ignore[list-item]  # Ray's annotation is of the callbacks before version 2
        ),
    )


def _scaling(parallelism: Parallelism, use_gpu: bool) -> ray.train.ScalingConfig:
    """A fixed number of workers, or Ray's elastic policy between two."""
    resources = {"CPU": parallelism.cpus_per_worker, "GPU": float(use_gpu)}
    elastic = parallelism.workers
    if not isinstance(elastic, Elastic):
        return ray.train.ScalingConfig(num_workers=elastic, use_gpu=use_gpu, resources_per_worker=resources)
    return ray.train.ScalingConfig(  # type: ignore[call-arg]  # Ray's annotation is of the class before version 2
        num_workers=(elastic.min, elastic.max),  # type: ignore[arg-type]
        use_gpu=use_gpu,
        resources_per_worker=resources,
        elastic_resize_monitor_interval_s=elastic.resize_check_seconds,
    )


class _NotTriedAgain(ray.train.UserCallback):
    """A mistake, damage or a diverged run fails again however often it is started: an error in a callback ends the run at once."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        permanent = _permanent(worker_exceptions)
        if permanent is not None:
            raise permanent


def _permanent(failures: Mapping[int, Exception]) -> Exception | None:
    """The failure among those of the workers that another start would not mend, and that a person is told of."""
    found = [getattr(failure, "_base_exc", failure) for failure in failures.values()]
    for kind in (DamageError, UserError, FloatingPointError):
        for failure in found:
            if isinstance(failure, kind) and not isinstance(failure, StorageError):
                return failure
    return None


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """The same recipe with absolute paths: workers run in folders of their own. The run's name keeps to what was typed."""
    sources = tuple(
        source
        if storage.is_remote(source.path)
        else source.model_copy(update={"path": str(Path(source.path).absolute())})
        for source in recipe.data.sources
    )
    base = recipe.model.base
    model = (
        recipe.model.model_copy(update={"base": str(Path(base).absolute())})
        if base and Path(base).exists()
        else recipe.model
    )
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"sources": sources}), "model": model})


def _worker(config: dict[str, Any]) -> None:
    """What every worker runs: `training.fit` with rows from Ray Data, telling Ray of each commit."""
    import torch

    fields = config["recipe"]
    fields["parallelism"]["device"] = config["device"]
    recipe = Recipe.model_validate(fields)
    torch.set_num_threads(max(1, int(recipe.parallelism.cpus_per_worker)))
    is_first = ray.train.get_context().get_world_rank() == 0

    def report(metrics: dict[str, Any], directory: str | None) -> None:
        # Every rank has written its part where it belongs: Ray has nothing to copy.
        ray.train.report(
            metrics,
            checkpoint=ray.train.Checkpoint(directory) if is_first and directory else None,
            checkpoint_dir_name=Path(str(directory)).name,
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
        )

    try:
        loop.fit(
            recipe,
            config["run_dir"],
            stream=ray_data_stream,
            report=report,
            is_machine_leaving=_is_machine_leaving,
            patience_seconds=_PATIENCE_SECONDS,
        )
    except Stopped as stopped:
        log.info("%s", stopped)  # on all workers at the same step; a failure would be started again


def _is_machine_leaving() -> bool:
    """Whether Ray has had notice that a machine of this run will be taken. Ray's public call is a barrier, and the loop agrees by itself."""
    return get_internal_train_context().preemption_context.preemption_info is not None


def _run_dir(recipe: Recipe, out: Path, fresh: bool) -> Path:
    """`<out>/<name>-<hash8>`; a fresh one gets the first free number behind it."""
    first = out / run_name(recipe)
    if not fresh or not first.exists():
        return first
    return next(path for path in (out / f"{first.name}-{number}" for number in range(2, 10_000)) if not path.exists())


def _finished(recipe: Recipe, run_dir: Path) -> RunResult | None:
    latest = listing.latest(str(run_dir))
    if latest is None:
        return None
    manifest = commit.read_manifest(latest)
    if manifest.step < recipe.training.steps:
        return None
    return RunResult(run_dir, latest, manifest.step, already_finished=True, metrics=manifest.extra["metrics"])


def check_before_starting(recipe: Recipe) -> None:
    """What would fail in every worker fails here, once and in seconds: data, tokenizer, base, family, objective."""
    indexes = open_sources(recipe.data.sources)
    setup.check_held_out(recipe, indexes)
    network = setup.resolve(recipe, setup.is_causal(recipe), indexes[0].tokenizer)
    with torch.device("meta"):  # what it keeps beside the network may be large, and here only its mistakes matter
        setup.build_objective(recipe, network, indexes[0].sequence_length)
    if recipe.objective.alignment_weight:
        teacher.describe(recipe)
    positions = network.config.get("max_position_embeddings") or network.config.get("n_positions")
    if positions is not None and positions < indexes[0].sequence_length:
        raise UserError(
            f"data.sources hold rows of {indexes[0].sequence_length} tokens, and the network has {positions} positions; build the data with "
            f"--sequence-length {positions} or less, or choose another model"
        )


def _cause(error: TrainingFailedError) -> Exception:
    """The failure of a worker that explains the others: a user's or a damaged file if there is one, else the first."""
    if isinstance(error, ControllerError):
        failure = error.controller_failure
        return (
            failure
            if isinstance(failure, (UserError, FloatingPointError))
            else RuntimeError(f"Ray Train failed: {failure!r}")
        )
    if not isinstance(error, WorkerGroupError):
        return RuntimeError(str(error))
    failures = [getattr(failure, "_base_exc", failure) for failure in error.worker_failures.values()]
    told = _permanent(error.worker_failures) or next(
        (failure for failure in failures if isinstance(failure, StorageError)), None
    )
    return told or RuntimeError(f"the workers failed: {failures[0]!r}" if failures else str(error))


@contextmanager
def _told_to_stop(run_dir: Path) -> Iterator[None]:
    """Within the context SIGTERM to this process becomes a file that the workers see between two steps, wherever they run."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: (run_dir / guards.STOP_FILE).touch())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _followed(path: Path, on_event: OnEvent | None) -> Iterator[None]:
    """Within the context a thread hands every new line of `path` to `on_event`."""
    if on_event is None:
        yield
        return
    stop = threading.Event()

    def follow(handle: OnEvent) -> None:
        seen = path.stat().st_size if path.exists() else 0
        while True:
            last_round = stop.wait(0.5)
            if path.exists():
                size = path.stat().st_size
                with path.open() as lines:
                    lines.seek(seen if size >= seen else 0)  # a resumed run writes the file anew
                    text = lines.read()
                whole = text[: text.rfind("\n") + 1]
                seen = (seen if size >= seen else 0) + len(whole.encode())
                for line in whole.splitlines():
                    handle(json.loads(line))
            if last_round:
                return

    follower = threading.Thread(target=follow, args=(on_event,), daemon=True)
    follower.start()
    try:
        yield
    finally:
        stop.set()
        follower.join()
