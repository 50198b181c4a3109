"""The validation of the training loop: sequences and draws are fixed, so that two values differ only by the model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from dlm_ray.config.manifest_fields import Validation
from dlm_ray.config.recipe import Recipe
from dlm_ray.data.reading import DataSequence
from dlm_ray.diffusion.denoiser import Batch, Objective
from dlm_ray.diffusion.draws import evaluation_times, maskable_positions
from dlm_ray.diffusion.likelihood import bits_per_byte, evaluation_batch
from dlm_ray.training import curriculum
from dlm_ray.training.step import TrainModule

DRAWS_PER_SEQUENCE = 4
TIME_BINS = 5


def validate(
    recipe: Recipe,
    root: TrainModule,
    objective: Objective,
    sequences: Sequence[DataSequence],
    rank: int,
    world_size: int,
    device: torch.device,
) -> Validation:
    """Return nats per token, bits per byte, and the unweighted cross-entropy by bin of t of the sequences.

    Collective: every rank passes the same sequences. The bound is that of `eval`: it covers all of t, independent of
    the schedule of training, so that t is the masked share.

    Returns:
        nats_per_token, bits_per_byte, and for a diffusion objective nll_by_t: TIME_BINS means over equal bins of t in
        (0, 1). An objective without a bound has block_nll, the mean cross-entropy of the tokens of a block, and
        block_nll_by_t.
    """
    x_0 = np.stack([sequence.input_ids for sequence in sequences]).astype(np.int64)
    document_ids = np.stack([sequence.document_ids for sequence in sequences])
    draws = 1 if objective.likelihood == "exact" else DRAWS_PER_SEQUENCE
    pairs = [(sequence, number) for sequence in range(len(sequences)) for number in range(draws)]
    share = np.array_split(np.arange(len(pairs)), world_size)[rank]
    largest_share = math.ceil(len(pairs) / world_size)
    num_batches = math.ceil(largest_share / recipe.training.micro_batch_size)
    times = evaluation_times(recipe.seed, range(len(sequences)), draws)
    sums = torch.zeros(1 + 2 * TIME_BINS, dtype=torch.float64, device=device)  # nats; nll by bin; count by bin
    with torch.no_grad():
        for indices in np.array_split(share, num_batches):
            selected = [pairs[i] for i in indices] or [pairs[0]]
            batch = evaluation_batch(
                objective,
                x_0,
                document_ids,
                selected,
                times,
                recipe.seed,
                lambda ids: curriculum.visibility(recipe, objective.is_causal, None, ids, device),
                device,
                is_real=len(indices) > 0,
            )
            _add_batch(sums, root, batch)
    reshard(root)
    dist.all_reduce(sums)
    num_bytes = sum(int(sequence.num_bytes.sum()) for sequence in sequences)
    return _means(sums, objective, draws, int(maskable_positions(document_ids).sum()), num_bytes)


def _add_batch(sums: Tensor, root: TrainModule, batch: Batch) -> None:
    """Add a batch to the sums [1 + 2 TIME_BINS]: weighted nats, then nats and number of tokens by bin of t."""
    count = batch.draw.num_scored  # padding follows, whose values do not count
    nll = root(batch, score_only=True)[:count].double()
    sums[0] += (batch.draw.weight[:count] * nll).sum()
    bins = (batch.draw.t_scored[:count] * TIME_BINS).long().clamp(max=TIME_BINS - 1)
    sums[1 : 1 + TIME_BINS].index_add_(0, bins, nll)
    sums[1 + TIME_BINS :].index_add_(0, bins, torch.ones_like(nll))


def _means(sums: Tensor, objective: Objective, draws: int, num_tokens: int, num_bytes: int) -> Validation:
    """Return the means that `validate` reports, from the sums of all ranks over `draws` draws per sequence."""
    nats = sums[0].item() / draws
    means = (sums[1 : 1 + TIME_BINS] / sums[1 + TIME_BINS :].clamp(min=1)).tolist()
    if objective.likelihood == "none":
        return {
            "block_nll": sums[1 : 1 + TIME_BINS].sum().item() / max(1.0, sums[1 + TIME_BINS :].sum().item()),
            "block_nll_by_t": means,
        }
    result: Validation = {
        "nats_per_token": nats / num_tokens,
        "bits_per_byte": bits_per_byte(nats, num_bytes),
    }
    if objective.likelihood == "bound":
        result["nll_by_t"] = means
    return result


def reshard(root: nn.Module) -> None:
    """Free the gathered weights, which stay without a backward pass and would be stale in the next forward."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
