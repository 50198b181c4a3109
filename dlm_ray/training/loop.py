"""`fit`: a run from its recipe, or from its last checkpoint, to its last step. In one process, under torchrun, or in a Ray Train worker."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from dlm_ray.checkpoint import commit, listing
from dlm_ray.config.errors import UserError
from dlm_ray.config.objective import rules_of
from dlm_ray.config.recipe import Recipe, Source
from dlm_ray.data.index import load_data_tokenizer
from dlm_ray.data.order import Cursor, Order
from dlm_ray.data.reading import Row, ShardReader, iterate_rows, open_sources, read_split
from dlm_ray.training import clip_search, curriculum, start, state, teacher
from dlm_ray.training import optimizer as optimization
from dlm_ray.training.ema import Ema
from dlm_ray.training.metrics import MetricsLog
from dlm_ray.training.step import StepResult, micro_batches, train_step
from dlm_ray.training.validate import validate

log = logging.getLogger(__name__)

Stream = Callable[..., Iterator[tuple[list[Row], Cursor]]]
Report = Callable[[dict[str, Any], str | None], None]


def local_stream(sources: Sequence[Source], order: Order, cursor: Cursor, **share: int) -> Iterator[tuple[list[Row], Cursor]]:
    """The rows of this rank, read in this process: per step its share of the global batch, and the cursor behind the whole batch."""
    return iterate_rows(ShardReader([source.path for source in sources], order.indexes), order, cursor, **share)


def fit(recipe: Recipe, run_dir: str | Path, *, stream: Stream = local_stream, report: Report | None = None) -> dict[str, Any]:
    """Trains until `training.steps`, from the last committed checkpoint of `run_dir` if there is one.

    Args:
        recipe: the run.
        run_dir: where checkpoints (`step_*`), `metrics.jsonl` and `tokenizer/` lie; the same on every rank.
        stream: gives the rows; `local_stream`, or Ray Data's.
        report: called on every rank after every commit with the last metrics and the committed directory.

    Returns:
        The last metrics; `checkpoint` is the last committed directory.

    Raises:
        UserError: if the recipe does not fit the data, the base or the run directory.
        DamageError: if a shard or checkpoint is damaged.
        FloatingPointError: if the gradient is not finite; the last checkpoint is good.
    """
    with _process_group(recipe):
        run = _Run(recipe, Path(run_dir))
        return run.train(stream, report)


class _Run:
    """The state of one run on one rank."""

    def __init__(self, recipe: Recipe, run_dir: Path):
        self.recipe, self.run_dir = recipe, run_dir
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device = pick_device(recipe.parallelism.device)
        self.host_group = dist.new_group(backend="gloo")
        self.indexes = open_sources(recipe.data.sources)
        self.order = Order(self.indexes, [source.weight for source in recipe.data.sources], recipe.seed, recipe.data.window_shards)
        # All ranks must resume from the same step, whatever each of them sees of the file system just now.
        latest = [listing.latest(str(run_dir)) if self.rank == 0 else None]
        dist.broadcast_object_list(latest, group=self.host_group)
        self.checkpoint: str | None = latest[0]
        if self.rank == 0:
            run_dir.mkdir(parents=True, exist_ok=True)
            load_data_tokenizer(recipe.data.sources[0].path).save_pretrained(str(run_dir / "tokenizer"))
        self._build()

    def _build(self) -> None:
        manifest = commit.read_manifest(self.checkpoint) if self.checkpoint else None
        tokenizer = self.indexes[0].tokenizer
        if manifest is None:
            self.network = start.resolve(self.recipe, start.is_causal(self.recipe), tokenizer)
        else:
            if manifest.tokenizer["sha256"] != tokenizer.sha256:
                raise UserError(
                    f"{self.checkpoint} was trained with tokenizer {manifest.tokenizer['name']} ({manifest.tokenizer['sha256'][:12]}) and "
                    f"data.sources hold {tokenizer.name} ({tokenizer.sha256[:12]}); point data.sources at the run's own data"
                )
            self.network = start.Network.from_manifest(manifest.model)
        self.objective = start.build_objective(self.recipe, self.network, self.indexes[0].row_tokens)
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        self.root, denoiser = start.build(self.recipe, self.network, self.objective, mesh, self.device)
        self.root.train()
        if self.recipe.objective.alignment_weight:
            self.objective.terms = replace(self.objective.terms, teacher=teacher.load(self.recipe, mesh, self.device))
        if manifest is None:
            start.fill(self.recipe, self.network, denoiser, self.objective)
        self.optimizer = optimization.build(self.recipe.optimizer, self.root)
        self.ema = Ema(self.root, self.recipe.ema.decay) if self.recipe.ema else None
        self.step, self.cursor = 0, Cursor.start(len(self.indexes))
        self.clip: list[float] | None = None  # what the search chose last
        if manifest is not None and self.checkpoint is not None:
            commit.load(self.checkpoint, state.tensors(self.root, self.optimizer, self.ema))
            optimization.set_step(self.optimizer, manifest.step)
            self.step, self.cursor = manifest.step, Cursor.from_dict(manifest.cursor)
            self.clip = manifest.extra.get("clip")
            if self.clip:
                clip_search.apply(self.recipe, self.objective, self.clip)
            log.info("resumed from %s", self.checkpoint)

    def train(self, stream: Stream, report: Report | None) -> dict[str, Any]:
        """The loop: one line a stage; everything in it happens on every rank at the same step."""
        recipe, num_steps = self.recipe, self.recipe.training.steps
        metrics_log = MetricsLog(recipe, self.run_dir, self.step) if self.rank == 0 else None
        held_out = self._held_out_rows()
        share = {
            "global_batch_rows": recipe.training.global_batch_rows,
            "rank": self.rank,
            "world_size": self.world_size,
            "num_steps": num_steps - self.step,
        }
        metrics: dict[str, Any] = {}
        clock = _Clock()
        unchecked: tuple[int, StepResult] | None = None
        for rows, cursor in stream(recipe.data.sources, self.order, self.cursor, **share):
            rate = optimization.learning_rate(recipe.optimizer, self.step, num_steps)
            optimization.set_learning_rate(self.optimizer, rate)
            batches = micro_batches(recipe, self.objective, rows, self.step, self.rank, self.world_size, self.device)
            result = train_step(self.root, self.objective, self.optimizer, batches, recipe.optimizer.max_gradient_norm, self.host_group)
            if unchecked is not None:
                _check_finite(recipe, *unchecked)  # one step late, so that the host never waits for the step it has just launched
            if self.ema is not None:
                self.ema.update(self.step)
            ratio = 0.0 if self.objective.is_causal else curriculum.annealing_ratio(recipe, self.step)
            self.step, self.cursor, unchecked = self.step + 1, cursor, (self.step + 1, result)
            clock.count(recipe.training.global_batch_rows * self.indexes[0].row_tokens)

            is_last = self.step == num_steps
            if self.step % recipe.tracking.log_every_steps == 0 or is_last:
                metrics |= result.metrics()
                if recipe.curriculum.block_sizes:
                    metrics["block_tokens"] = curriculum.block_tokens(recipe, self.step - 1)
                metrics |= {"learning_rate": rate, "visible_future": ratio, "tokens_per_second": clock.tokens_per_second()}
                if metrics_log is not None:
                    metrics_log.write(self.step, **metrics, rows=self.cursor.rows)
            if recipe.validation.rows and held_out and (self.step % recipe.validation.every_steps == 0 or is_last):
                with clock.paused(), self.ema.swapped_in() if self.ema else nullcontext():
                    validation = validate(
                        recipe, self.root, self.objective, held_out[: recipe.validation.rows], self.rank, self.world_size, self.device
                    )
                if metrics_log is not None:
                    metrics_log.write(self.step, validation=validation)
                metrics["validation"] = validation
            search = recipe.curriculum.clip_search
            if search is not None and held_out and self.step % search.every_steps == 0 and not is_last:
                with clock.paused(), self.ema.swapped_in() if self.ema else nullcontext():
                    found = clip_search.search(
                        recipe, self.root, self.objective, held_out[: search.rows], self.rank, self.world_size, self.device
                    )
                self.clip = [found[0].beta, found[0].omega]
                clip_search.apply(recipe, self.objective, self.clip)
                if metrics_log is not None:
                    metrics_log.write(self.step, clip_search=[asdict(one) for one in found])
                    log.info("step %d: clip [%g, %g], variance %.4g", self.step, *self.clip, found[0].variance)
            if self.step % recipe.checkpoint.every_steps == 0 or is_last:
                _check_finite(recipe, self.step, result)
                with clock.paused():
                    self._commit(metrics)
                    if report is not None:
                        report({"step": self.step, **metrics}, self.checkpoint)
        if metrics_log is not None:
            metrics_log.close()
        assert self.step == num_steps, f"the stream ended after step {self.step} of {num_steps}"
        return {"step": self.step, "checkpoint": self.checkpoint, **metrics}

    def _held_out_rows(self) -> list[Row]:
        """Held-out rows of every source, as many of each."""
        search = self.recipe.curriculum.clip_search
        wanted = max(self.recipe.validation.rows, search.rows if search else 0)
        per_source = -(-wanted // len(self.indexes))
        rows: list[Row] = []
        if per_source:
            for source in self.recipe.data.sources:
                rows += read_split(source.path, "held_out", per_source)
        return rows[:wanted]

    def _commit(self, metrics: dict[str, Any]) -> None:
        directory = listing.step_directory(str(self.run_dir), self.step)
        commit.save(
            directory,
            state.tensors(self.root, self.optimizer, self.ema),
            {
                "step": self.step,
                "recipe": self.recipe.model_dump(mode="json"),
                "tokenizer": self.indexes[0].tokenizer.as_dict(),
                "model": {**self.network.as_manifest(), "objective": self.recipe.objective.name},
                "capabilities": self._capabilities(),
                "cursor": self.cursor.as_dict(),
                "extra": {"metrics": metrics, "clip": self.clip},
            },
            group=self.host_group,
        )
        self.checkpoint = directory
        if self.rank == 0:
            listing.prune(str(self.run_dir), self.recipe.checkpoint.keep_last)

    def _capabilities(self) -> dict[str, Any]:
        """What can be asked of the checkpoint."""
        row_tokens = self.indexes[0].row_tokens
        block_tokens = 1 if self.network.is_causal else self.recipe.objective.block_tokens or row_tokens
        is_whole = block_tokens == row_tokens and self.objective.likelihood != "none"
        return {
            "likelihood": self.objective.likelihood,
            "infill": is_whole,
            "canvas": "simplex_blocks" if self.objective.likelihood == "none" else "whole" if is_whole else "blocks",
            "block_tokens": block_tokens,
            "rules": list(rules_of(self.recipe.objective.name)),
            "row_tokens": row_tokens,
            "document_mask": self.recipe.data.document_mask,
        }


def pick_device(name: str) -> torch.device:
    """The device of this process: `auto` takes CUDA where there is one, the local rank's.

    Raises:
        UserError: if CUDA is asked for and absent.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("parallelism.device=cuda, and this machine shows no CUDA device; set parallelism.device=cpu or auto")
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


def _check_finite(recipe: Recipe, step: int, result: StepResult) -> None:
    """Raises FloatingPointError on every rank alike, because the norm is of the global gradient.

    Names the step, its rows in the order of the run, and the objective: what it takes to look at the same batch again.
    """
    norm = result.gradient_norm.item()
    if not math.isfinite(norm):
        rows = recipe.training.global_batch_rows
        raise FloatingPointError(
            f"step {step} (rows {(step - 1) * rows} to {step * rows - 1} of the run's order) of objective {recipe.objective.name}: loss "
            f"{result.metrics()['loss']:.6g}, gradient norm {norm}, not finite; the last checkpoint is good. Lower optimizer.learning_rate"
        )


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
