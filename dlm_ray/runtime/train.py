"""Run a recipe on Ray Train: start the workers, restart them after failures, and follow the run's metrics."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from dlm_ray.checkpoint import listing
from dlm_ray.checkpoint.manifest import read_manifest
from dlm_ray.config.errors import DamageError, Stopped, StorageError, UserError
from dlm_ray.config.load import dump, run_name
from dlm_ray.config.manifest_fields import JsonObject, RunMetrics
from dlm_ray.config.paths import local_path
from dlm_ray.config.recipe import Elastic, Parallelism, Recipe
from dlm_ray.config.trees import with_absolute_paths
from dlm_ray.runtime import cluster  # imported first: it sets the variables that Ray reads when it is imported

# isort: split
import ray
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.execution.context import get_train_context as get_internal_train_context
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError
from ray.train.v2.api.report_config import CheckpointUploadMode

from dlm_ray.data.reading import open_sources
from dlm_ray.runtime.events import OnEvent, followed
from dlm_ray.runtime.stream import ray_data_stream
from dlm_ray.training import guards, loop, setup, teacher

log = logging.getLogger(__name__)

# Workers of a driver that was killed end by themselves, and write until then.
_PATIENCE_SECONDS = 60.0


@dataclass(frozen=True)
class RunResult:
    """The directory of a run and its final state."""

    run_dir: Path
    checkpoint: str
    """Directory of the last step."""
    step: int
    already_finished: bool
    """Whether the run had finished before this call."""
    metrics: RunMetrics = field(default_factory=lambda: RunMetrics())
    """Metrics of the last step, with the last validation."""


def fit(
    recipe: Recipe,
    out: str | Path = "runs",
    *,
    fresh: bool = False,
    on_start: Callable[[Path], None] | None = None,
    on_event: OnEvent | None = None,
) -> RunResult:
    """Run a recipe to its end on Ray. The same call resumes an interrupted run; for a finished run it returns at once.

    Args:
        recipe: the run.
        out: folder of runs; the run directory is `<out>/<name>-<hash8>`. Workers on other machines must see the same
            path.
        fresh: start a new run even if one of the same recipe exists.
        on_start: called with the run directory before the workers start.
        on_event: called with every line of `metrics.jsonl` while the workers run, and with the steps in between.

    Raises:
        UserError: if the recipe does not fit the data, its base or the cluster, before any worker starts; or if another
            process owns the run.
        DamageError: if a shard or a checkpoint is damaged, or the disk is full. Neither is retried.
        RuntimeError: if the workers failed more often than `parallelism.max_failures`, with the cause.
        Stopped: after SIGTERM, or once a file `stop` is in the run directory; the state is saved.
    """
    run_dir = _run_dir(recipe, local_path(out, "out").absolute(), fresh)
    finished = _finished(recipe, run_dir)
    if finished is not None:
        return finished
    check_before_starting(recipe)
    with guards.sole_owner(run_dir, "run"):
        (run_dir / "recipe.yaml").write_text(dump(recipe))
        # The manifests say which checkpoints exist. Ray's own list may name pruned ones, and Ray would refuse to start.
        (run_dir / "checkpoint_manager_snapshot.json").unlink(missing_ok=True)
        (run_dir / guards.STOP_FILE).unlink(missing_ok=True)  # of a run that was killed before it could stop
        if on_start is not None:
            on_start(run_dir)
        with cluster.session():
            cluster.check_fits(recipe.parallelism)
            with followed(run_dir / "metrics.jsonl", on_event), _sigterm_as_stop_file(run_dir):
                try:
                    _trainer(recipe, run_dir).fit()
                except TrainingFailedError as error:
                    raise _cause(error) from error
    result = _finished(recipe, run_dir)
    if result is None:
        latest = listing.latest(str(run_dir))
        assert latest is not None, f"Ray Train ended without an error, and {run_dir} has no checkpoint"
        raise Stopped(
            f"the run stopped before step {recipe.training.steps}, as requested; {latest} has its state. Rerun the "
            "same command to resume"
        )
    return RunResult(run_dir, result.checkpoint, result.step, already_finished=False, metrics=result.metrics)


def check_before_starting(recipe: Recipe) -> None:
    """Check data, tokenizer, base, network and objective in this process, before workers start and fail one by one.

    Raises:
        UserError: if anything does not fit.
    """
    indexes = open_sources(recipe.data.sources)
    setup.check_held_out(recipe, indexes)
    length = indexes[0].sequence_length
    network = setup.resolve(recipe, setup.is_causal(recipe), indexes[0].tokenizer)
    with torch.device("meta"):  # its buffers may be large, and only its errors matter here
        setup.build_objective(recipe, network, length)
    if recipe.objective.alignment_weight:
        teacher.describe(recipe)
    positions = network.config.get("max_position_embeddings") or network.config.get("n_positions")
    if positions is not None and positions < length:
        raise UserError(
            f"data.sources have sequences of {length} tokens, and the network has {positions} positions; build the "
            f"data with sequence_length={positions} or less, or choose another model"
        )


def _run_dir(recipe: Recipe, out: Path, fresh: bool) -> Path:
    """Return `<out>/<name>-<hash8>`; with `fresh`, the first name with a number appended that does not exist."""
    first = out / run_name(recipe)
    if not fresh or not first.exists():
        return first
    return next(path for path in (out / f"{first.name}-{number}" for number in range(2, 10_000)) if not path.exists())


def _finished(recipe: Recipe, run_dir: Path) -> RunResult | None:
    """Return the result of a run that has reached its last step, else None."""
    latest = listing.latest(str(run_dir))
    if latest is None:
        return None
    manifest = read_manifest(latest)
    if manifest.step < recipe.training.steps:
        return None
    return RunResult(run_dir, latest, manifest.step, already_finished=True, metrics=manifest.extra["metrics"])


def _trainer(recipe: Recipe, run_dir: Path) -> TorchTrainer:
    parallelism = recipe.parallelism
    use_gpu = parallelism.device == "cuda" or (
        parallelism.device == "auto" and cluster.resources().get("GPU", 0) >= parallelism.fewest_workers
    )
    return TorchTrainer(
        _worker,
        train_loop_config={
            "recipe": with_absolute_paths(recipe.model_dump(mode="json")),
            "run_dir": str(run_dir),
            "device": "cuda" if use_gpu else "cpu",
        },
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=_scaling(parallelism, use_gpu),
        run_config=ray.train.RunConfig(
            name=run_dir.name,
            storage_path=str(run_dir.parent),
            failure_config=ray.train.FailureConfig(max_failures=parallelism.max_failures),
            callbacks=[_EndOnPermanentFailure()],  # type: ignore[list-item]  # Ray annotates the callbacks of version 1
        ),
    )


def _scaling(parallelism: Parallelism, use_gpu: bool) -> ray.train.ScalingConfig:
    """Return a fixed number of workers, or Ray's elastic policy for a range."""
    resources = {"CPU": parallelism.cpus_per_worker, "GPU": float(use_gpu)}
    elastic = parallelism.workers
    if not isinstance(elastic, Elastic):
        return ray.train.ScalingConfig(num_workers=elastic, use_gpu=use_gpu, resources_per_worker=resources)
    return ray.train.ScalingConfig(  # type: ignore[call-arg]  # Ray annotates the class of version 1
        num_workers=(elastic.min, elastic.max),  # type: ignore[arg-type]
        use_gpu=use_gpu,
        resources_per_worker=resources,
        elastic_resize_monitor_interval_s=elastic.resize_check_seconds,
    )


def _worker(config: JsonObject) -> None:
    """Run `training.loop.fit` in a worker, with sequences from Ray Data and checkpoints reported to Ray."""
    import torch

    fields = config["recipe"]
    fields["parallelism"]["device"] = config["device"]
    recipe = Recipe.model_validate(fields)
    torch.set_num_threads(max(1, int(recipe.parallelism.cpus_per_worker)))
    is_first = ray.train.get_context().get_world_rank() == 0

    def report(metrics: RunMetrics, directory: str | None) -> None:
        # Every rank has written its part into the final directory, so Ray has nothing to copy.
        ray.train.report(
            dict(metrics),
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
        log.info("%s", stopped)  # raised by all workers at the same step; Ray would restart after an exception


def _is_machine_leaving() -> bool:
    """Return whether Ray has been notified that a machine of this run will be taken away.

    Ray's public function is a barrier; the training loop agrees across ranks by itself.
    """
    return get_internal_train_context().preemption_context.preemption_info is not None


class _EndOnPermanentFailure(ray.train.UserCallback):
    """Ends the run at once for a user error, damage or divergence, which a restart would only repeat."""

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
        permanent = _permanent(worker_exceptions)
        if permanent is not None:
            raise permanent  # Ray ends a run whose callback fails


def _permanent(failures: Mapping[int, Exception]) -> Exception | None:
    """Return the workers' failure that a restart would not mend and that the user has to see, if there is one."""
    causes = [getattr(failure, "_base_exc", failure) for failure in failures.values()]
    for kind in (DamageError, UserError, FloatingPointError):
        for cause in causes:
            if isinstance(cause, kind) and not isinstance(cause, StorageError):
                return cause
    return None


def _cause(error: TrainingFailedError) -> Exception:
    """Return the failure to show: a user error or damage if there is one, else the first worker's."""
    if isinstance(error, ControllerError):
        failure = error.controller_failure
        is_clear = isinstance(failure, (UserError, FloatingPointError))
        return failure if is_clear else RuntimeError(f"Ray Train failed: {failure!r}")
    if not isinstance(error, WorkerGroupError):
        return RuntimeError(str(error))
    causes = [getattr(failure, "_base_exc", failure) for failure in error.worker_failures.values()]
    storage_error = next((cause for cause in causes if isinstance(cause, StorageError)), None)
    clear = _permanent(error.worker_failures) or storage_error
    return clear or RuntimeError(f"the workers failed: {causes[0]!r}" if causes else str(error))


@contextmanager
def _sigterm_as_stop_file(run_dir: Path) -> Iterator[None]:
    """Turn SIGTERM to this process into a stop file, which workers on any machine see between two steps."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: (run_dir / guards.STOP_FILE).touch())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
