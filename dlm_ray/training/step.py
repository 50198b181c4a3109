"""One optimizer step: every micro-batch through the objective, one division by the global count, clip, AdamW."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dlm_ray.config.recipe import Recipe
from dlm_ray.diffusion.denoiser import Batch, LossSum
from dlm_ray.diffusion.draws import Draw, DrawKey, maskable_positions
from dlm_ray.training import curriculum


class TrainModule(nn.Module):
    """The root that FSDP2 wraps: its forward runs the whole objective, so that every collective is issued in one order on all ranks."""

    def __init__(self, denoiser: nn.Module, objective: Any):
        super().__init__()
        self.denoiser = denoiser
        self.objective: Any = objective

    def forward(self, batch: Batch, score_only: bool = False, draws: Sequence[Draw] = ()) -> Any:
        """LossSum of the micro-batch; with `score_only` the [R] nats of its scored positions; with `draws` of its rows, those of each."""
        if draws:
            return self.objective.nll_of_draws(self.denoiser, batch, draws)
        if score_only:
            return self.objective.token_nll(self.denoiser, batch)
        return self.objective(self.denoiser, batch)


@dataclass(frozen=True)
class StepResult:
    """What one step did; tensors stay on the device until somebody logs them."""

    sums: Tensor
    """[1 + names] this rank's sums: the weighted loss first, then `names`."""
    names: tuple[str, ...]
    divisors: tuple[int, ...]
    """What each named sum is divided by."""
    count: int
    num_scored: int
    gradient_norm: Tensor
    """Scalar, of the global gradient before clipping."""
    loss: Tensor
    """Scalar, the loss of the global batch. It may be infinite where the gradient is finite: that of a token which has probability 0."""
    is_skipped: bool = False
    """Nothing was updated, because loss or gradient was not finite."""

    def is_finite(self) -> bool:
        """Whether loss and gradient are; the host waits for both."""
        return math.isfinite(self.loss.item()) and math.isfinite(self.gradient_norm.item())

    def metrics(self) -> dict[str, float]:
        """The step's means over all ranks; collective."""
        sums = self.sums.clone()
        dist.all_reduce(sums)
        values = sums.tolist()
        named = {
            name: value / max(1, by) for name, by, value in zip(self.names, self.divisors, values[1:], strict=True)
        }
        return {"loss": self.loss.item(), "gradient_norm": self.gradient_norm.item(), **named}


def num_micro_steps(recipe: Recipe, world_size: int, draws_per_sequence: int = 1) -> int:
    """Forward passes of one worker in one step: as many on every worker as the one with most rows needs.

    The draws of a row are passed together, and count as rows of the pass.
    """
    most = -(-recipe.training.global_batch_size // world_size)
    return -(-most // max(1, recipe.training.micro_batch_size // draws_per_sequence))


def micro_batches(
    recipe: Recipe, objective: Any, rows: Sequence[Any], step: int, rank: int, world_size: int, device: torch.device
) -> list[Batch]:
    """This rank's rows of one global batch as `num_micro_steps` batches with their draws.

    A rank with fewer rows than micro-steps runs its first row again with nothing masked and nothing scored. An objective that wants several
    draws of a row finds its copies next to each other, with numbers of their own in the global batch.
    """
    total, copies = recipe.training.global_batch_size, objective.draws_per_sequence
    share = np.array_split(np.arange(total), world_size)[rank]
    assert len(share) == len(rows), (
        f"the stream gave {len(rows)} rows where this rank's share of the global batch is {len(share)}"
    )
    batches = []
    for part in np.array_split(np.arange(len(share)), num_micro_steps(recipe, world_size, copies)):
        chosen = [rows[i] for i in part] or [rows[0]]
        x_0 = np.stack([row.input_ids for row in chosen]).astype(np.int64).repeat(copies, axis=0)
        document_ids = np.stack([row.document_ids for row in chosen]).astype(np.int32).repeat(copies, axis=0)
        maskable = maskable_positions(document_ids) & (len(part) > 0)
        numbers = [int(share[i]) * copies + copy for i in (part if len(part) else [0]) for copy in range(copies)]
        key = DrawKey(recipe.seed, step, numbers, total * copies, curriculum.block_tokens(recipe, step))
        draw = objective.draw(key, x_0, maskable)
        visible = curriculum.visibility(recipe, objective.is_causal, step, document_ids, device)
        batches.append(Batch(torch.from_numpy(x_0).to(device, non_blocking=True), draw.to(device), visible))
    return batches


def train_step(
    root: Any,
    objective: Any,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    max_norm: float,
    host_group: Any,
    *,
    skips_nonfinite: bool = False,
) -> StepResult:
    """Forward, backward, clip and update over the global batch of which `batches` is this rank's part.

    Every sum is divided by the count of what it sums over. The counts are on the host, so the division is known before
    the first backward pass and nothing waits for the device; only to skip a step that is not finite does the host wait
    for its loss and norm, which are the same on all ranks.
    """
    draws = [batch.draw for batch in batches]
    own_counts = (
        [objective.count(draw) for draw in draws],
        [draw.num_scored for draw in draws],
        [draw.num_maskable for draw in draws],
    )
    counts = torch.tensor([sum(column) for column in own_counts])
    dist.all_reduce(counts, group=host_group)
    count, num_scored, num_maskable = max(1, int(counts[0])), int(counts[1]), int(counts[2])
    sums: Tensor | None = None
    names: tuple[str, ...] = ()
    divisors: tuple[int, ...] = ()
    for i, batch in enumerate(batches):
        root.set_requires_gradient_sync(i == len(batches) - 1)
        loss: LossSum = root(batch)
        # FSDP2 averages gradients over ranks; the loss is a sum over them.
        total = loss.total(count, num_maskable)
        (total * (dist.get_world_size() / count)).backward()
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
        parts = torch.stack([total.detach(), *logged]).double()
        sums = parts if sums is None else sums + parts
    assert sums is not None, "a step has at least one micro-batch"
    total = sums[0].clone()
    dist.all_reduce(total)
    norm = _clip(root.denoiser.parameters(), _reduced(objective.parameters()), max_norm)
    result = StepResult(sums, names, divisors, count, num_scored, norm, total / count)
    if skips_nonfinite and not result.is_finite():
        result = replace(result, is_skipped=True)
    else:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return result


def _reduced(own: Iterable[nn.Parameter]) -> list[Tensor]:
    """Gradients of the objective's own parameters, whole on every rank, averaged over ranks as FSDP2 averages the network's."""
    gradients = []
    for parameter in own:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
        gradients.append(parameter.grad.div_(dist.get_world_size()))
    return gradients


def _clip(sharded: Iterable[nn.Parameter], replicated: list[Tensor], max_norm: float) -> Tensor:
    """Clips the gradients to one norm over both kinds, and returns it."""
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
