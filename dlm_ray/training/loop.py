"""`fit`: train a run to its last step, in one process, under torchrun, or in a Ray Train worker."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple, cast

from dlm_ray.checkpoint import agreement
from dlm_ray.config.errors import DamageError, Stopped
from dlm_ray.config.manifest_fields import RunMetrics
from dlm_ray.config.paths import local_path
from dlm_ray.config.recipe import Recipe
from dlm_ray.data.order import Cursor
from dlm_ray.data.reading import DataSequence, check_ids, held_out_sequences
from dlm_ray.diffusion.objectives.block import Block
from dlm_ray.training import clip_search, curriculum, guards
from dlm_ray.training import optimizer as optimization
from dlm_ray.training.faults import LossAlarm, bad_sequences, write_bad_step
from dlm_ray.training.metrics import MetricsLog, ThroughputClock
from dlm_ray.training.run import Run, process_group
from dlm_ray.training.saving import Saved, Snapshot
from dlm_ray.training.step import StepResult, micro_batches, train_step
from dlm_ray.training.stream import Stream, local_stream
from dlm_ray.training.validate import validate

Report = Callable[[RunMetrics, str | None], None]


def fit(
    recipe: Recipe,
    run_dir: str | Path,
    *,
    stream: Stream = local_stream,
    report: Report | None = None,
    is_machine_leaving: Callable[[], bool] | None = None,
    patience_seconds: float = 0.0,
) -> RunMetrics:
    """Train until `training.steps`, from the last committed checkpoint of `run_dir` if it has one.

    Args:
        recipe: the recipe of the run.
        run_dir: the directory of checkpoints (`step_*`), `metrics.jsonl` and `tokenizer/`; the same on every rank.
        stream: yields the training batches; `local_stream`, or Ray Data's.
        report: called on every rank, at the same step, after every commit, with the metrics of the committed step and
            the directory of the checkpoint.
        is_machine_leaving: called on every rank after every step. When it first returns True on any rank, the state is
            committed and the run continues.
        patience_seconds: how long to wait for another writer of `run_dir` to end before raising.

    Returns:
        The last metrics, with `step`, and `checkpoint`: the last committed directory.

    Raises:
        UserError: if the recipe does not fit the data, the base or the run directory, or another process writes to it.
        DamageError: if a shard or checkpoint is damaged, or the disk is full.
        FloatingPointError: if the loss or gradient is not finite, after more than `training.max_skipped_steps` such
            steps in a row; the last checkpoint is valid.
        Stopped: after SIGTERM, or if `run_dir` contains a file `stop`; the state is committed.
    """
    run_dir = local_path(run_dir, "run_dir")
    with process_group(recipe), guards.StopRequest(run_dir) as stop, ExitStack() as resources:
        run = Run(recipe, run_dir, resources, patience_seconds)
        return TrainingLoop(run, stop, report, is_machine_leaving or (lambda: False)).train(stream)


class _Signals(NamedTuple):
    """Events of one step on all ranks, so that every rank takes the same decisions."""

    num_bad_sequences: int
    is_stop_requested: bool
    is_machine_leaving: bool
    is_save_done: bool
    """Whether every rank has finished its part of the save in progress."""


class _CompletedStep(NamedTuple):
    """A step, and what is needed to run it again."""

    step: int
    """Counted from 1."""
    cursor: Cursor
    """The position before the global batch."""
    result: StepResult


class TrainingLoop:
    """The stages of a training step; every rank runs every stage at the same step."""

    def __init__(
        self, run: Run, stop: guards.StopRequest, report: Report | None, is_machine_leaving: Callable[[], bool]
    ):
        recipe = run.recipe
        self.run, self.recipe, self.num_steps = run, recipe, recipe.training.steps
        self._stop, self._report, self._is_machine_leaving = stop, report, is_machine_leaving
        self._metrics_log = MetricsLog(recipe, run.run_dir, run.step) if run.rank == 0 else None
        self._alarm = LossAlarm(recipe.tracking.alarm_deviations, self._metrics_log.losses if self._metrics_log else [])
        search, sources = recipe.curriculum.clip_search, recipe.data.sources
        self._validation_sequences = held_out_sequences(sources, run.indexes, recipe.validation.sequences)
        self._search_sequences = held_out_sequences(sources, run.indexes, search.sequences if search else 0)
        held_out = [*self._validation_sequences, *self._search_sequences]
        check_ids(held_out, run.network.mask_id, run.network.vocab_size)
        self._clock = ThroughputClock()
        self._unchecked: _CompletedStep | None = None
        self._metrics: dict[str, float | None] = {}
        # Kept apart from `_metrics`, which every log line repeats: validation belongs to the step that it measured.
        self._validation: RunMetrics = {}

    def train(self, stream: Stream) -> RunMetrics:
        """Run every stage for every remaining step; see `fit` for the result and the errors."""
        run = self.run
        for sequences, cursor in self._batches(stream):
            result = self._step(sequences)
            run.step, run.cursor = run.step + 1, cursor
            self._log(result)
            self._validate()
            self._search_clip()
            signals = self._exchange_signals(sequences)
            self._count_bad(sequences, signals)
            self._save_if_due(signals)
            self._stop_if_requested(signals)
        if self._metrics_log is not None:
            self._metrics_log.close()
        assert run.step == self.num_steps, f"the stream ended after step {run.step} of {self.num_steps}"
        return {"step": run.step, "checkpoint": run.checkpoint, **self._all_metrics()}

    def _all_metrics(self) -> RunMetrics:
        """Return the last logged metrics, with the last validation."""
        return cast("RunMetrics", self._metrics | self._validation)

    @property
    def _is_last(self) -> bool:
        """Whether the run has reached its last step."""
        return self.run.step == self.num_steps

    def _batches(self, stream: Stream) -> Iterator[tuple[list[DataSequence], Cursor]]:
        """Return this rank's sequences of every remaining step, and the cursor after each global batch."""
        run = self.run
        return stream(
            self.recipe.data.sources,
            run.order,
            run.cursor,
            on_bad_sample=self.recipe.data.on_bad_sample,
            global_batch_size=self.recipe.training.global_batch_size,
            rank=run.rank,
            world_size=run.world_size,
            num_steps=self.num_steps - run.step,
        )

    def _step(self, sequences: Sequence[DataSequence]) -> StepResult:
        """Take one optimizer step, check the previous one, and update the average of the weights."""
        run, recipe = self.run, self.recipe
        rate = optimization.learning_rate(recipe.optimizer, run.step, self.num_steps)
        optimization.set_learning_rate(run.optimizer, rate)
        check_ids(sequences, run.network.mask_id, run.network.vocab_size)
        batches = micro_batches(recipe, run.objective, sequences, run.step, run.rank, run.world_size, run.device)
        result = train_step(
            run.root,
            run.objective,
            run.optimizer,
            batches,
            recipe.optimizer.max_grad_norm,
            run.host_group,
            skips_nonfinite=recipe.training.max_skipped_steps > 0,
        )
        run.faults.count_step(result.is_skipped)
        completed = _CompletedStep(run.step + 1, run.cursor, result)
        # The check is one step late, so that the host never waits for the step that it has just launched; a skipped
        # step is known at once.
        self._check_finite(completed if result.is_skipped else self._unchecked)
        self._unchecked = completed
        if run.ema is not None and not result.is_skipped:
            run.ema.update(run.step - run.faults.skipped_steps)
        self._clock.count(recipe.training.global_batch_size * run.sequence_length)
        return result

    def _log(self, result: StepResult) -> None:
        """Write the metrics of the step, every `tracking.log_every_steps` steps and at the last one."""
        run, recipe = self.run, self.recipe
        if self._metrics_log is not None:
            self._metrics_log.advance(run.step, self._clock.tokens_per_second())
        if run.step % recipe.tracking.log_every_steps != 0 and not self._is_last:
            return
        index = run.step - 1
        step_metrics = result.metrics()
        self._metrics |= step_metrics
        if recipe.curriculum.block_sizes:
            self._metrics["block_tokens"] = curriculum.block_tokens(recipe, index)
        self._metrics |= {
            "learning_rate": optimization.learning_rate(recipe.optimizer, index, self.num_steps),
            "annealing_ratio": 0.0 if run.objective.is_causal else curriculum.annealing_ratio(recipe, index),
            "tokens_per_second": self._clock.tokens_per_second(),
        }
        if self._metrics_log is not None:
            faults: dict[str, int] = {}
            if self._alarm.is_spike(run.step, step_metrics["loss"]):
                faults["loss_spike"] = True
            if run.faults.skipped_steps:
                faults["skipped_steps"] = run.faults.skipped_steps
            counts = {"sequences": run.cursor.num_sequences, "workers": run.world_size}
            self._metrics_log.write(run.step, **self._metrics, **faults, **counts)

    def _validate(self) -> None:
        """Measure the held-out sequences with the averaged weights, every `validation.every_steps` and at the end."""
        run, every_steps = self.run, self.recipe.validation.every_steps
        if not self._validation_sequences or (run.step % every_steps != 0 and not self._is_last):
            return
        with self._evaluation():
            validation = validate(
                self.recipe,
                run.root,
                run.objective,
                self._validation_sequences,
                run.rank,
                run.world_size,
                run.device,
            )
        if self._metrics_log is not None:
            self._metrics_log.write(run.step, validation=validation)
        self._validation = {"validation": validation, "validated_step": run.step}

    def _search_clip(self) -> None:
        """Replace the clip by the one with the least variance on the held-out sequences, when a search is due."""
        run = self.run
        if not self._search_sequences or not clip_search.is_due(self.recipe, run.step) or self._is_last:
            return
        assert isinstance(run.objective, Block), "only block objectives search a clip"
        with self._evaluation():
            candidates = clip_search.search(
                self.recipe, run.root, run.objective, self._search_sequences, run.rank, run.world_size, run.device
            )
        best = candidates[0]
        run.clip = clip_search.apply(self.recipe, run.objective, (best.beta, best.omega))
        if self._metrics_log is not None:
            self._metrics_log.write(run.step, clip_search=[vars(candidate) for candidate in candidates])

    @contextmanager
    def _evaluation(self) -> Iterator[None]:
        """Use the averaged weights, if the run keeps them; the time inside does not count as training."""
        with ExitStack() as context:
            context.enter_context(self._clock.paused())
            if self.run.ema is not None:
                context.enter_context(self.run.ema.swapped_in())
            yield

    def _exchange_signals(self, sequences: Sequence[DataSequence]) -> _Signals:
        """Combine what the ranks have noticed during this step: one message between the hosts."""
        run = self.run
        local = [
            len(bad_sequences(sequences)),
            int(self._stop.is_made()),
            int(self._is_machine_leaving()),
            int(run.saver.is_done()),
        ]
        num_bad, num_stop, num_leaving, num_done = agreement.totals(local, run.host_group)
        return _Signals(num_bad, num_stop > 0, num_leaving > 0, num_done == run.world_size)

    def _count_bad(self, sequences: Sequence[DataSequence], signals: _Signals) -> None:
        """Count the sequences of the global batch that could not be read, on all ranks.

        Raises:
            DamageError: if no sequence of the batch could be read.
        """
        run, num_bad = self.run, signals.num_bad_sequences
        if not num_bad:
            return
        local = bad_sequences(sequences)
        findings = [finding for rank in agreement.gathered(lambda: local, run.host_group) for finding in rank]
        run.faults.count_sequences(findings)
        if num_bad == self.recipe.training.global_batch_size:
            raise DamageError(
                f"step {run.step}: none of its {num_bad} sequences can be read ({findings[0]}); restore the shards"
            )

    def _save_if_due(self, signals: _Signals) -> None:
        """Let the saver begin, finish or await saves; record and report the finished ones."""
        with self._clock.paused():
            finished = self.run.saver.after_step(
                self.run.step,
                self._snapshot,
                is_last=self._is_last,
                is_stopping=signals.is_stop_requested,
                is_machine_leaving=signals.is_machine_leaving,
                is_done_everywhere=signals.is_save_done,
            )
            for saved in finished:
                self._record_save(saved)
                if self._report is not None and saved.directory is not None:
                    self._report({"step": saved.step, **saved.metrics}, saved.directory)

    def _snapshot(self) -> Snapshot:
        """Return the state to save, once the step is known to be finite."""
        self._check_finite(self._unchecked)
        metrics = self._all_metrics()
        return Snapshot(self.run.tensors(), self.run.manifest_fields(metrics), metrics)

    def _record_save(self, saved: Saved) -> None:
        """Note the checkpoint of a finished save, and log how long the save blocked the training."""
        self.run.checkpoint = saved.directory or self.run.checkpoint
        if self._metrics_log is not None:
            self._metrics_log.write(
                self.run.step, checkpoint=saved.directory, of_step=saved.step, blocked_seconds=saved.blocked_seconds
            )

    def _stop_if_requested(self, signals: _Signals) -> None:
        """Raise Stopped if a stop is requested before the last step; the state is committed."""
        if not signals.is_stop_requested:
            return
        self._stop.clear()
        if not self._is_last:
            raise Stopped(
                f"stopped after step {self.run.step} of {self.num_steps}, as requested; "
                f"{self.run.checkpoint} holds the state"
            )

    def _check_finite(self, completed: _CompletedStep | None) -> None:
        """Raise FloatingPointError on every rank if a step's loss or gradient, which are global, is not finite.

        The error names the step, its sequences in the order of the run, and the objective; rank 0 writes a file with
        everything that is needed to run the same step again.
        """
        if completed is None or completed.result.is_finite():
            return
        step, cursor, result = completed
        run, recipe = self.run, self.recipe
        if result.is_skipped and run.faults.skipped_in_a_row <= recipe.training.max_skipped_steps:
            return
        saved = run.saver.end()
        if saved is not None:
            self._record_save(saved)
        metrics, batch_size, hint = result.metrics(), recipe.training.global_batch_size, ""
        if run.rank == 0:
            path = write_bad_step(
                run.run_dir, recipe, run.order, step=step, cursor=cursor, checkpoint=run.checkpoint, metrics=metrics
            )
            hint = f", and {path} holds everything that is needed to run the step again"
        raise FloatingPointError(
            f"step {step} (sequences {(step - 1) * batch_size} to {step * batch_size - 1} of the run's order) of "
            f"objective {recipe.objective.name}: loss {metrics['loss']:.6g}, gradient norm "
            f"{metrics['gradient_norm']}, not finite; the last checkpoint is valid{hint}. "
            "Lower optimizer.learning_rate"
        )
