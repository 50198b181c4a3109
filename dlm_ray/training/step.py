"""One optimizer step: micro-batches through the objective, division by the global count, clipping, AdamW."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dlm_ray.config.recipe import Recipe
from dlm_ray.data.reading import DataSequence
from dlm_ray.diffusion.denoiser import Batch, LossSum, Objective
from dlm_ray.diffusion.draws import Draw, DrawKey, maskable_positions
from dlm_ray.diffusion.objectives.block import Block
from dlm_ray.models.denoiser import HuggingFaceDenoiser
from dlm_ray.training import curriculum


class TrainModule(nn.Module):
    """The root module that FSDP2 wraps; its forward runs the whole objective, so that collectives keep one order."""

    def __init__(self, denoiser: HuggingFaceDenoiser, objective: Objective):
        super().__init__()
        self.denoiser = denoiser
        self.objective = objective

    def forward(
        self, batch: Batch, score_only: bool = False, draws: Sequence[Draw] = ()
    ) -> LossSum | Tensor | list[Tensor]:
        """Return the LossSum of the micro-batch.

        With `score_only`, return the [R] nats of the scored positions; with `draws`, the nats of each of these draws.
        """
        if draws:
            assert isinstance(self.objective, Block), "only block objectives share a pass between draws"
            return self.objective.nll_of_draws(self.denoiser, batch, draws)
        if score_only:
            return self.objective.token_nll(self.denoiser, batch)
        return self.objective(self.denoiser, batch)


@dataclass(frozen=True)
class StepResult:
    """The result of one step; its tensors stay on the device until they are logged."""

    sums: Tensor
    """[1 + len(names)]: this rank's sum of the weighted loss, then the sums of `names`."""
    names: tuple[str, ...]
    divisors: tuple[int, ...]
    """The global count that each named sum is divided by."""
    count: int
    num_scored: int
    gradient_norm: Tensor
    """Scalar: the norm of the global gradient before clipping."""
    loss: Tensor
    """Scalar: the loss of the global batch. It can be infinite with a finite gradient, if a token has probability 0."""
    is_skipped: bool = False
    """Whether the update was left out, because loss or gradient was not finite."""

    def is_finite(self) -> bool:
        """Return whether loss and gradient are finite; the host waits for both."""
        return math.isfinite(self.loss.item()) and math.isfinite(self.gradient_norm.item())

    def metrics(self) -> dict[str, float]:
        """Return the step's means over all ranks. Collective."""
        sums = self.sums.clone()
        dist.all_reduce(sums)
        values = sums.tolist()
        named = {
            name: value / max(1, by) for name, by, value in zip(self.names, self.divisors, values[1:], strict=True)
        }
        return {"loss": self.loss.item(), "gradient_norm": self.gradient_norm.item(), **named}


def num_micro_steps(recipe: Recipe, world_size: int, draws_per_sequence: int = 1) -> int:
    """Return the number of forward passes per step, which is the same on all workers: what the largest share needs.

    The draws of a sequence are in one pass, and each counts as a sequence of the pass.
    """
    most = -(-recipe.training.global_batch_size // world_size)
    return -(-most // max(1, recipe.training.micro_batch_size // draws_per_sequence))


def micro_batches(
    recipe: Recipe,
    objective: Objective,
    sequences: Sequence[DataSequence],
    step: int,
    rank: int,
    world_size: int,
    device: torch.device,
) -> list[Batch]:
    """Return this rank's sequences of one global batch as `num_micro_steps` batches with their draws.

    A rank with fewer sequences than micro-steps repeats its first sequence with nothing masked and nothing scored. For
    an objective with several draws per sequence, the copies of a sequence are adjacent and have their own numbers in
    the global batch.
    """
    total, copies = recipe.training.global_batch_size, objective.draws_per_sequence
    share = np.array_split(np.arange(total), world_size)[rank]
    assert len(share) == len(sequences), (
        f"the stream gave {len(sequences)} sequences where this rank's share of the global batch is {len(share)}"
    )
    batches = []
    for indices in np.array_split(np.arange(len(share)), num_micro_steps(recipe, world_size, copies)):
        selected = [sequences[i] for i in indices] or [sequences[0]]
        x_0 = np.stack([sequence.input_ids for sequence in selected]).astype(np.int64).repeat(copies, axis=0)
        document_ids = np.stack([sequence.document_ids for sequence in selected]).astype(np.int32)
        document_ids = document_ids.repeat(copies, axis=0)
        maskable = maskable_positions(document_ids) & (len(indices) > 0)
        numbers = [int(share[i]) * copies + copy for i in (indices if len(indices) else [0]) for copy in range(copies)]
        key = DrawKey(recipe.seed, step, numbers, total * copies, curriculum.block_tokens(recipe, step))
        draw = objective.draw(key, x_0, maskable)
        visible = curriculum.visibility(recipe, objective.is_causal, step, document_ids, device)
        batches.append(Batch(torch.from_numpy(x_0).to(device, non_blocking=True), draw.to(device), visible))
    return batches


def train_step(
    root: TrainModule,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    max_norm: float,
    host_group: dist.ProcessGroup | None,
    *,
    skips_nonfinite: bool = False,
) -> StepResult:
    """Run one optimizer step for a global batch, of which `batches` is this rank's part.

    Every sum is divided by the count of what it sums over. The counts are on the host, so the divisor is known before
    the first backward pass and nothing waits for the device. With `skips_nonfinite`, the host waits for loss and norm,
    which are equal on all ranks, and leaves the update out if they are not finite.

    Args:
        root: the wrapped module.
        objective: the objective of `root`.
        optimizer: updates the parameters of `root`.
        batches: this rank's micro-batches.
        max_norm: the largest norm of the global gradient; a larger gradient is scaled down to it.
        host_group: the group for messages between the hosts; the default group if None.
        skips_nonfinite: whether to leave out an update that is not finite.
    """
    divisors = _global_divisors(objective, batches, host_group)
    sums, names, divisor_of_name = _accumulate_gradients(root, batches, divisors)
    total = sums[0].clone()
    dist.all_reduce(total)
    norm = _clip(root.denoiser.parameters(), _reduced(root.get_submodule("objective").parameters()), max_norm)
    count = divisors.loss
    result = StepResult(sums, names, divisor_of_name, count, divisors.num_scored, norm, total / count)
    if skips_nonfinite and not result.is_finite():
        result = replace(result, is_skipped=True)
    else:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return result


class _Divisors(NamedTuple):
    """The counts of a global batch by which its sums are divided."""

    loss: int
    """The sum of `Objective.count`; 1 if nothing counts."""
    num_scored: int
    num_maskable: int


def _global_divisors(objective: Objective, batches: Sequence[Batch], host_group: dist.ProcessGroup | None) -> _Divisors:
    """Return the counts over the micro-batches of all ranks. Collective, on the host."""
    draws = [batch.draw for batch in batches]
    local_counts = (
        [objective.count(draw) for draw in draws],
        [draw.num_scored for draw in draws],
        [draw.num_maskable for draw in draws],
    )
    counts = torch.tensor([sum(column) for column in local_counts])
    dist.all_reduce(counts, group=host_group)
    return _Divisors(max(1, int(counts[0])), int(counts[1]), int(counts[2]))


def _accumulate_gradients(
    root: TrainModule, batches: Sequence[Batch], global_divisors: _Divisors
) -> tuple[Tensor, tuple[str, ...], tuple[int, ...]]:
    """Run forward and backward of this rank's micro-batches; only the last one reduces the gradients over the ranks.

    Returns:
        `sums`, `names` and `divisors` of the StepResult.
    """
    count, num_scored, num_maskable = global_divisors
    sums: Tensor | None = None
    names: tuple[str, ...] = ()
    divisors: tuple[int, ...] = ()
    for i, batch in enumerate(batches):
        if isinstance(root, FSDPModule):
            root.set_requires_gradient_sync(i == len(batches) - 1)
        loss: LossSum = root(batch)
        # FSDP2 averages gradients over ranks; the loss is a sum over them.
        total = loss.total(count, num_maskable)
        torch.autograd.backward(total * (dist.get_world_size() / count))
        names = (*loss.by_name, *loss.by_token, *loss.over_tokens)
        divisors = (
            *[num_scored] * len(loss.by_name),
            *[count] * len(loss.by_token),
            *[num_maskable] * len(loss.over_tokens),
        )
        logged = (
            *loss.by_name.values(),
            *loss.by_token.values(),
            *(value.detach() for value in loss.over_tokens.values()),
        )
        batch_sums = torch.stack([total.detach(), *logged]).double()
        sums = batch_sums if sums is None else sums + batch_sums
    assert sums is not None, "a step has at least one micro-batch"
    return sums, names, divisors


def _reduced(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Average the gradients of the objective's replicated parameters over the ranks, as FSDP2 does the others."""
    gradients = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
        gradients.append(parameter.grad.div_(dist.get_world_size()))
    return gradients


def _clip(sharded: Iterable[nn.Parameter], replicated: list[Tensor], max_norm: float) -> Tensor:
    """Clip the gradients by their joint norm, and return the norm before clipping."""
    gradients = [parameter.grad for parameter in sharded if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if replicated:
        norm = torch.linalg.vector_norm(torch.stack([norm, *(gradient.norm() for gradient in replicated)]))
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    torch._foreach_mul_([*local, *replicated], factor)
    return norm
