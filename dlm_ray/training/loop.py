"""`fit`: a run from its recipe, or from its last checkpoint, to its last step. In one process, under torchrun, or in a Ray Train worker."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from dlm_ray.checkpoint import agreement, commit, listing
from dlm_ray.config.errors import DamageError, Stopped, UserError
from dlm_ray.config.paths import local_path
from dlm_ray.config.recipe import Recipe, Source
from dlm_ray.data.index import load_data_tokenizer
from dlm_ray.data.order import Cursor, Order
from dlm_ray.data.reading import (
    DataSequence,
    ShardReader,
    check_ids,
    held_out_rows,
    iterate_rows,
    open_sources,
)
from dlm_ray.diffusion.objectives import Masked
from dlm_ray.training import clip_search, curriculum, guards, setup, state, teacher
from dlm_ray.training import optimizer as optimization
from dlm_ray.training.capabilities import capabilities
from dlm_ray.training.ema import Ema
from dlm_ray.training.faults import Faults, LossAlarm, bad_sequences, write_bad_step
from dlm_ray.training.metrics import MetricsLog
from dlm_ray.training.saving import Saver
from dlm_ray.training.step import StepResult, micro_batches, train_step
from dlm_ray.training.validate import validate

log = logging.getLogger(__name__)

Stream = Callable[..., Iterator[tuple[list[DataSequence], Cursor]]]
Report = Callable[[dict[str, Any], str | None], None]


def local_stream(
    sources: Sequence[Source], order: Order, cursor: Cursor, *, on_bad_sample: str = "fail", **share: int
) -> Iterator[tuple[list[DataSequence], Cursor]]:
    """The rows of this rank, read in this process: per step its share of the global batch, and the cursor behind the whole batch."""
    reader = ShardReader([source.path for source in sources], order.indexes, on_bad_sample=on_bad_sample)
    return iterate_rows(reader, order, cursor, **share)


def fit(
    recipe: Recipe,
    run_dir: str | Path,
    *,
    stream: Stream = local_stream,
    report: Report | None = None,
    is_machine_leaving: Callable[[], bool] | None = None,
    patience_seconds: float = 0.0,
) -> dict[str, Any]:
    """Trains until `training.steps`, from the last committed checkpoint of `run_dir` if there is one.

    Args:
        recipe: the run.
        run_dir: where checkpoints (`step_*`), `metrics.jsonl` and `tokenizer/` lie; the same on every rank.
        stream: gives the rows; `local_stream`, or Ray Data's.
        report: called on every rank, at the same step, after every commit with the metrics of its step and the committed directory.
        is_machine_leaving: asked on every rank between steps; the first time that one says so, the state is committed, and the run goes on.
        patience_seconds: how long another writer of `run_dir` may take to end before this one is refused.

    Returns:
        The last metrics; `checkpoint` is the last committed directory.

    Raises:
        UserError: if the recipe does not fit the data, the base or the run directory, or another process writes it.
        DamageError: if a shard or checkpoint is damaged, or the disk is full.
        FloatingPointError: if loss or gradient is not finite (`training.max_skipped_steps` times in a row); the last checkpoint is good.
        Stopped: after SIGTERM, or once there is a file `stop` in `run_dir`; the state is committed.
    """
    run_dir = local_path(run_dir, "run_dir")
    with _process_group(recipe), guards.StopRequest(run_dir) as stop, ExitStack() as held:
        run = _Run(recipe, run_dir, held, patience_seconds)
        return run.train(stream, report, stop, is_machine_leaving or (lambda: False))


class _Run:
    """The state of one run on one rank."""

    def __init__(self, recipe: Recipe, run_dir: Path, held: ExitStack, patience_seconds: float):
        self.recipe, self.run_dir = recipe, run_dir
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device = pick_device(recipe.parallelism.device)
        self.host_group = dist.new_group(backend="gloo")
        self.indexes = open_sources(recipe.data.sources)
        setup.check_held_out(recipe, self.indexes)
        self.data_identity = guards.data_identity(self.indexes)
        self.order = Order(
            self.indexes, [source.weight for source in recipe.data.sources], recipe.seed, recipe.data.window_shards
        )

        def open_directory() -> str | None:
            if self.rank != 0:
                return None
            held.enter_context(guards.sole_owner(run_dir, "writer", patience_seconds=patience_seconds))
            load_data_tokenizer(recipe.data.sources[0].path).save_pretrained(str(run_dir / "tokenizer"))
            return listing.latest(str(run_dir))

        # All ranks must resume from the same step, whatever each of them sees of the file system just now.
        self.checkpoint: str | None = agreement.gathered(open_directory, self.host_group)[0]
        self.faults = Faults()
        self.saver = Saver(recipe.checkpoint, run_dir, self.rank)
        held.callback(self.saver.close)
        self._build()

    def _build(self) -> None:
        manifest = commit.read_manifest(self.checkpoint) if self.checkpoint else None
        self.recipe = setup.with_precision(self.recipe, self.device, manifest.recipe if manifest else None)
        tokenizer = self.indexes[0].tokenizer
        if manifest is None:
            self.network = setup.resolve(self.recipe, setup.is_causal(self.recipe), tokenizer)
        else:
            if manifest.tokenizer["sha256"] != tokenizer.sha256:
                raise UserError(
                    f"{self.checkpoint} was trained with tokenizer {manifest.tokenizer['name']} ({manifest.tokenizer['sha256'][:12]}) and "
                    f"data.sources hold {tokenizer.name} ({tokenizer.sha256[:12]}); point data.sources at the run's own data"
                )
            then = manifest.extra.get("data", self.data_identity)
            guards.check_same_run(self.recipe, self.data_identity, str(self.checkpoint), manifest.recipe, then)
            self.network = setup.Network.from_manifest(manifest.model)
        self.objective = setup.build_objective(self.recipe, self.network, self.indexes[0].sequence_length)
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        self.root, denoiser = setup.build(self.recipe, self.network, self.objective, mesh, self.device)
        self.root.train()
        if self.recipe.objective.alignment_weight:
            assert isinstance(self.objective, Masked), "alignment is for masked objectives"
            self.objective.terms = replace(self.objective.terms, teacher=teacher.load(self.recipe, mesh, self.device))
        if manifest is None:
            setup.init_weights(self.recipe, self.network, denoiser, self.objective)
        self.optimizer = optimization.build(self.recipe.optimizer, self.root)
        self.ema = Ema(self.root, self.recipe.ema.decay) if self.recipe.ema else None
        self.step, self.cursor = 0, Cursor.start(len(self.indexes))
        self.clip: tuple[float, float] | None = None  # what the search chose last
        if manifest is not None and self.checkpoint is not None:
            self._load(self.checkpoint)
            self.faults = Faults(**manifest.extra.get("faults", {}))
            optimization.set_step(self.optimizer, manifest.step - self.faults.skipped_steps)
            self.step, self.cursor = manifest.step, Cursor.from_dict(manifest.cursor)
            if manifest.extra.get("clip"):
                self.clip = clip_search.apply(self.recipe, self.objective, manifest.extra["clip"])
            log.info("resumed from %s", self.checkpoint)

    def _load(self, checkpoint: str) -> None:
        """Damage that one rank finds is every rank's failure."""

        def read() -> None:
            commit.load(checkpoint, state.tensors(self.root, self.optimizer, self.ema))

        agreement.gathered(read, self.host_group)

    def train(
        self, stream: Stream, report: Report | None, stop: guards.StopRequest, is_machine_leaving: Callable[[], bool]
    ) -> dict[str, Any]:
        """The loop: one line a stage; everything in it happens on every rank at the same step."""
        recipe, num_steps = self.recipe, self.recipe.training.steps
        self.metrics_log = MetricsLog(recipe, self.run_dir, self.step) if self.rank == 0 else None
        alarm = LossAlarm(recipe.tracking.alarm_deviations, self.metrics_log.losses if self.metrics_log else [])
        search = recipe.curriculum.clip_search
        validated = held_out_rows(recipe.data.sources, self.indexes, recipe.validation.sequences)
        searched = held_out_rows(recipe.data.sources, self.indexes, search.sequences if search else 0)
        check_ids([*validated, *searched], self.network.mask_id, self.network.vocab_size)
        share = {
            "global_batch_size": recipe.training.global_batch_size,
            "rank": self.rank,
            "world_size": self.world_size,
            "num_steps": num_steps - self.step,
        }
        metrics: dict[str, Any] = {}
        measured: dict[str, Any] = {}  # apart from what every log line says: it is of the step that was validated
        clock = _Clock()
        unchecked: tuple[int, Cursor, StepResult] | None = None
        has_left = False
        for rows, cursor in stream(
            recipe.data.sources, self.order, self.cursor, on_bad_sample=recipe.data.on_bad_sample, **share
        ):
            rate = optimization.learning_rate(recipe.optimizer, self.step, num_steps)
            optimization.set_learning_rate(self.optimizer, rate)
            check_ids(rows, self.network.mask_id, self.network.vocab_size)
            batches = micro_batches(recipe, self.objective, rows, self.step, self.rank, self.world_size, self.device)
            skips = {"skips_nonfinite": recipe.training.max_skipped_steps > 0}
            result = train_step(
                self.root,
                self.objective,
                self.optimizer,
                batches,
                recipe.optimizer.max_grad_norm,
                self.host_group,
                **skips,
            )
            self.faults.count_step(result.is_skipped)
            if result.is_skipped:
                self._check_finite(self.step + 1, self.cursor, result)
            elif unchecked is not None:
                self._check_finite(
                    *unchecked
                )  # one step late, so that the host never waits for the step it has just launched
            if self.ema is not None and not result.is_skipped:
                self.ema.update(self.step - self.faults.skipped_steps)
            ratio = 0.0 if self.objective.is_causal else curriculum.annealing_ratio(recipe, self.step)
            unchecked = (self.step + 1, self.cursor, result)
            self.step, self.cursor = self.step + 1, cursor
            clock.count(recipe.training.global_batch_size * self.indexes[0].sequence_length)

            is_last = self.step == num_steps
            if self.step % recipe.tracking.log_every_steps == 0 or is_last:
                metrics |= result.metrics()
                if recipe.curriculum.block_sizes:
                    metrics["block_tokens"] = curriculum.block_tokens(recipe, self.step - 1)
                metrics |= {
                    "learning_rate": rate,
                    "annealing_ratio": ratio,
                    "tokens_per_second": clock.tokens_per_second(),
                }
                if self.metrics_log is not None:
                    alarms = {"loss_spike": True} if alarm.rings(self.step, metrics["loss"]) else {}
                    skipped = {"skipped_steps": self.faults.skipped_steps} if self.faults.skipped_steps else {}
                    self.metrics_log.write(
                        self.step, **metrics, **alarms, **skipped, rows=self.cursor.rows, workers=self.world_size
                    )
            if validated and (self.step % recipe.validation.every_steps == 0 or is_last):
                with clock.paused(), self.ema.swapped_in() if self.ema else nullcontext():
                    validation = validate(
                        recipe, self.root, self.objective, validated, self.rank, self.world_size, self.device
                    )
                if self.metrics_log is not None:
                    self.metrics_log.write(self.step, validation=validation)
                measured = {"validation": validation, "validated_step": self.step}
            if searched and clip_search.is_due(recipe, self.step) and not is_last:
                with clock.paused(), self.ema.swapped_in() if self.ema else nullcontext():
                    found = clip_search.search(
                        recipe, self.root, self.objective, searched, self.rank, self.world_size, self.device
                    )
                self.clip = clip_search.apply(recipe, self.objective, (found[0].beta, found[0].omega))
                if self.metrics_log is not None:
                    self.metrics_log.write(self.step, clip_search=[vars(one) for one in found])

            bad_rows = bad_sequences(rows)
            own = [len(bad_rows), int(stop.is_made()), int(is_machine_leaving()), int(self.saver.is_over())]
            num_bad, is_asked, is_leaving, is_over = agreement.totals(own, self.host_group)
            if num_bad:
                self._count_bad(bad_rows, num_bad)
            with clock.paused():
                if is_over == self.world_size:
                    self._finish_save(report)
                is_due = self.step % recipe.checkpoint.every_steps == 0 or is_last
                if is_due or is_asked or (is_leaving and not has_left):
                    self._check_finite(*unchecked)
                    self._finish_save(report)
                    self._begin_save(metrics | measured)
                if is_last or is_asked or is_leaving or not recipe.checkpoint.asynchronous:
                    self._finish_save(report, has_to_succeed=is_last or bool(is_asked))
                has_left = has_left or bool(is_leaving)
            if is_asked:
                stop.obeyed()
            if is_asked and not is_last:
                raise Stopped(
                    f"stopped after step {self.step} of {num_steps}, as it was asked to; {self.checkpoint} holds its state"
                )
        if self.metrics_log is not None:
            self.metrics_log.close()
        assert self.step == num_steps, f"the stream ended after step {self.step} of {num_steps}"
        return {"step": self.step, "checkpoint": self.checkpoint, **metrics, **measured}

    def _begin_save(self, metrics: dict[str, Any]) -> None:
        fields = {
            "step": self.step,
            "recipe": self.recipe.model_dump(mode="json"),
            "tokenizer": self.indexes[0].tokenizer.as_dict(),
            "model": {**self.network.as_manifest(), "objective": self.recipe.objective.name},
            "capabilities": capabilities(self.recipe, self.objective, self.indexes[0].sequence_length),
            "cursor": self.cursor.as_dict(),
            "extra": {
                "metrics": dict(metrics),
                "faults": self.faults.as_dict(),
                "data": self.data_identity,
                "clip": self.clip,
            },
        }
        self.saver.begin(self.step, state.tensors(self.root, self.optimizer, self.ema), fields, dict(metrics))

    def _finish_save(self, report: Report | None, *, has_to_succeed: bool = False) -> None:
        """Waits for the save that is on its way, if one is, and tells of it."""
        saved = self.saver.end(has_to_succeed=has_to_succeed)
        if saved is None:
            return
        self.checkpoint = saved.directory or self.checkpoint
        if self.metrics_log is not None:
            self.metrics_log.write(
                self.step, checkpoint=saved.directory, of_step=saved.step, blocked_seconds=saved.blocked_seconds
            )
        if report is not None and saved.directory is not None:
            report({"step": saved.step, **saved.metrics}, saved.directory)

    def _count_bad(self, own: list[str], num_bad: int) -> None:
        """Counts the rows that were left out of this step's global batch, on all ranks alike.

        Raises:
            DamageError: if not one row of the batch is left.
        """
        everybodys = [finding for rank in agreement.gathered(lambda: own, self.host_group) for finding in rank]
        self.faults.count_rows(everybodys)
        if num_bad == self.recipe.training.global_batch_size:
            raise DamageError(
                f"step {self.step}: not one of its {num_bad} rows can be read ({everybodys[0]}); restore the shards"
            )

    def _check_finite(self, step: int, cursor: Cursor, result: StepResult) -> None:
        """Raises FloatingPointError on every rank alike, because loss and norm are the global batch's.

        Names the step, its rows in the order of the run, and the objective; a file holds what it takes to run the same step again.
        """
        norm, recipe = result.gradient_norm.item(), self.recipe
        if result.is_finite() or (
            result.is_skipped and self.faults.skipped_in_a_row <= recipe.training.max_skipped_steps
        ):
            return
        self._finish_save(None)
        metrics, rows = result.metrics(), recipe.training.global_batch_size
        where = ""
        if self.rank == 0:
            path = write_bad_step(
                self.run_dir, recipe, self.order, step=step, cursor=cursor, checkpoint=self.checkpoint, metrics=metrics
            )
            where = f", and {path} holds what it takes to run the step again"
        raise FloatingPointError(
            f"step {step} (rows {(step - 1) * rows} to {step * rows - 1} of the run's order) of objective {recipe.objective.name}: loss "
            f"{metrics['loss']:.6g}, gradient norm {norm}, not finite; the last checkpoint is good{where}. Lower optimizer.learning_rate"
        )


def pick_device(name: str) -> torch.device:
    """The device of this process: `auto` takes CUDA where there is one, the local rank's.

    Raises:
        UserError: if CUDA is asked for and absent.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "parallelism.device=cuda, and this machine shows no CUDA device; set parallelism.device=cpu or auto"
        )
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


@contextmanager
def _process_group(recipe: Recipe) -> Iterator[None]:
    """The process group that is there already (Ray Train's), or one of ours for as long as the run lasts: torchrun's, or of this process alone."""
    if dist.is_initialized():
        yield
        return
    backend = "nccl" if pick_device(recipe.parallelism.device).type == "cuda" else "gloo"
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


class _Clock:
    """Tokens a second of training alone: the first step pays for warming up, and validation and commits do not count."""

    def __init__(self) -> None:
        self._mark: float | None = None
        self._tokens, self._seconds = 0, 0.0

    def count(self, tokens: int) -> None:
        """A step has ended."""
        now = time.perf_counter()
        if self._mark is not None:
            self._tokens, self._seconds = self._tokens + tokens, self._seconds + now - self._mark
        self._mark = now

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside does not count."""
        entered = time.perf_counter()
        yield
        if self._mark is not None:
            self._mark += time.perf_counter() - entered

    def tokens_per_second(self) -> float:
        """Mean since the first step; 0 before the second."""
        return self._tokens / self._seconds if self._seconds else 0.0
