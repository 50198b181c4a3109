"""The bound on held-out rows inside the training loop: fixed rows and draws, so that two values differ by the model alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from dlm_ray.config.recipe import Recipe
from dlm_ray.diffusion.draws import evaluation_times, maskable_positions
from dlm_ray.diffusion.likelihood import bits_per_byte, evaluation_batch
from dlm_ray.training import curriculum

DRAWS_PER_ROW = 4
TIME_BINS = 5


def validate(
    recipe: Recipe, root: Any, objective: Any, rows: Sequence[Any], rank: int, world_size: int, device: torch.device
) -> dict[str, Any]:
    """Nats a token and bits a byte of `rows`, and the unweighted cross-entropy by bin of t. Collective: every rank passes the same rows.

    The bound is the one that `eval` reports: over all of t, whatever the schedule of training is, so that t is the share that is masked.

    Returns:
        nats_per_token, bits_per_byte, and for a diffusion objective nll_by_t: TIME_BINS means over t in equal bins of (0, 1). An objective
        without a bound has block_nll, the cross-entropy of a block's token, and block_nll_by_t.
    """
    x_0 = np.stack([row.input_ids for row in rows]).astype(np.int64)
    document_ids = np.stack([row.document_ids for row in rows])
    draws = 1 if objective.likelihood == "exact" else DRAWS_PER_ROW
    pairs = [(row, number) for row in range(len(rows)) for number in range(draws)]
    mine = np.array_split(np.arange(len(pairs)), world_size)[rank]
    most = math.ceil(len(pairs) / world_size)
    num_batches = math.ceil(most / recipe.training.micro_batch_size)
    times = evaluation_times(recipe.seed, range(len(rows)), draws)
    sums = torch.zeros(1 + 2 * TIME_BINS, dtype=torch.float64, device=device)  # nats; nll by bin; count by bin
    with torch.no_grad():
        for part in np.array_split(mine, num_batches):
            chosen = [pairs[i] for i in part] or [pairs[0]]
            batch = evaluation_batch(
                objective,
                x_0,
                document_ids,
                chosen,
                times,
                recipe.seed,
                lambda ids: curriculum.visibility(recipe, objective.is_causal, None, ids, device),
                device,
                is_real=len(part) > 0,
            )
            count = batch.draw.num_scored  # behind them is padding, which counts for nothing whatever its value is
            nll = root(batch, score_only=True)[:count].double()
            sums[0] += (batch.draw.weight[:count] * nll).sum()
            bins = (batch.draw.t_scored[:count] * TIME_BINS).long().clamp(max=TIME_BINS - 1)
            sums[1 : 1 + TIME_BINS].index_add_(0, bins, nll)
            sums[1 + TIME_BINS :].index_add_(0, bins, torch.ones_like(nll))
    reshard(root)
    dist.all_reduce(sums)
    nats = sums[0].item() / draws
    means = (sums[1 : 1 + TIME_BINS] / sums[1 + TIME_BINS :].clamp(min=1)).tolist()
    if objective.likelihood == "none":
        return {
            "block_nll": sums[1 : 1 + TIME_BINS].sum().item() / max(1.0, sums[1 + TIME_BINS :].sum().item()),
            "block_nll_by_t": means,
        }
    num_bytes = sum(int(row.num_bytes.sum()) for row in rows)
    result: dict[str, Any] = {
        "nats_per_token": nats / int(maskable_positions(document_ids).sum()),
        "bits_per_byte": bits_per_byte(nats, num_bytes),
    }
    if objective.likelihood == "bound":
        result["nll_by_t"] = means
    return result


def reshard(root: Any) -> None:
    """Lets go of gathered weights: without a backward pass they would stay, and the next forward would use these again."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
