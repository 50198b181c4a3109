"""The likelihood of rows: exact for an autoregressive model, a bound for a diffusion model; its sums, strata, and intervals.

A diffusion model's value is the ELBO over the full range of t with alpha(0) = 1 and alpha(1) = 0, so there is no reconstruction
or prior term to add (GenMD4, whose range begins at t_1, adds its own), and whatever the training did to its schedule does not enter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from dlm_ray.diffusion.denoiser import Batch, Denoiser, Objective
from dlm_ray.diffusion.draws import evaluation_times, maskable_positions
from dlm_ray.diffusion.objectives.block import Block
from dlm_ray.diffusion.visibility import Visibility, documents_apart

NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class TokenNats:
    """-log p (or its bound) of every token, and how much of it is chance."""

    nats: np.ndarray
    """[N, L] float64, the mean over draws; 0 where nothing is scored."""
    draw_totals: np.ndarray
    """[draws] float64: the total over rows by each draw alone."""


def evaluation_batch(
    objective: Objective,
    x_0: np.ndarray,
    document_ids: np.ndarray,
    pairs: Sequence[tuple[int, int]],
    times: np.ndarray,
    seed: int,
    visibility_of: Callable[[np.ndarray], Visibility],
    device: torch.device,
    is_real: bool = True,
) -> Batch:
    """The batch that scores pairs (row, number of the draw).

    Args:
        objective: makes the draws.
        x_0, document_ids: [N, L] of all rows.
        pairs: B pairs; a row may stand in several.
        times: [N, draws].
        seed: of the masks.
        visibility_of: from the [B, L] document ids of the batch.
        device: of the network.
        is_real: False scores nothing (a filler that keeps ranks in step).
    """
    rows = [row for row, _ in pairs]
    maskable = maskable_positions(document_ids[rows]) & is_real
    t = np.array([times[pair] for pair in pairs])
    draw = objective.evaluation_draw(seed, [(number, row) for row, number in pairs], t, x_0[rows], maskable)
    return Batch(torch.from_numpy(x_0[rows]).to(device), draw.to(device), visibility_of(document_ids[rows]))


def num_padding(objective: Any, sequence_length: int) -> int:
    """Return how many positions a row lacks to be a whole number of the objective's blocks; 0 if it is not made of blocks."""
    return -sequence_length % objective.block_tokens if isinstance(objective, Block) else 0


def pad_to_blocks(objective: Any, x_0: np.ndarray, document_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return rows [N, L] and their document ids, padded by `num_padding` positions.

    Padding is document -1: it is never scored, and `documents_apart` hides it from the text.
    """
    width = ((0, 0), (0, num_padding(objective, x_0.shape[1])))
    return np.pad(x_0, width), np.pad(document_ids, width, constant_values=-1)


@torch.no_grad()
def token_nats(
    denoiser: Denoiser,
    objective: Objective,
    x_0: np.ndarray,
    document_ids: np.ndarray,
    visibility_of: Callable[[np.ndarray], Visibility],
    device: torch.device,
    *,
    num_draws: int = 8,
    seed: int = 0,
    micro_batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> TokenNats:
    """The (bound on the) nats of every token of rows [N, L], from `num_draws` draws a row with t in strata; one exact pass if causal.

    Two models that are scored with the same rows, seed and draws see the same masks, so their difference can be paired. Rows that are not a whole
    number of the objective's blocks are padded (`pad_to_blocks`); the text does not see the padding, whatever `visibility_of` says.
    """
    assert objective.likelihood != "none", "this objective bounds nothing"
    num_draws = 1 if objective.likelihood == "exact" else num_draws
    length = x_0.shape[1]
    x_0, document_ids = pad_to_blocks(objective, x_0, document_ids)
    num_positions = x_0.shape[1]

    def visible(ids: np.ndarray) -> Visibility:
        found = visibility_of(ids)
        if found.document_ids is None and num_positions > length:
            return replace(found, document_ids=documents_apart(ids, False, device))
        return found

    times = evaluation_times(seed, range(len(x_0)), num_draws)
    pairs = [(row, number) for row in range(len(x_0)) for number in range(num_draws)]
    nats, totals = np.zeros(x_0.shape), np.zeros(num_draws)
    for start in range(0, len(pairs), micro_batch_size):
        chosen = pairs[start : start + micro_batch_size]
        batch = evaluation_batch(objective, x_0, document_ids, chosen, times, seed, visible, device)
        weighted = (
            (batch.draw.weight * objective.token_nll(denoiser, batch)).double().cpu().numpy()[: batch.draw.num_scored]
        )
        scored = batch.draw.scored[: batch.draw.num_scored].cpu().numpy()
        rows, numbers = np.array(chosen)[scored // num_positions].T
        np.add.at(nats, (rows, scored % num_positions), weighted / num_draws)
        np.add.at(totals, numbers, weighted)
        if progress is not None:
            progress(start + len(chosen), len(pairs))
    return TokenNats(nats[:, :length], totals)


def bits_per_byte(nats: float, num_bytes: float) -> float:
    """Nats over raw UTF-8 bytes, in bits."""
    return nats / math.log(2) / num_bytes


def draws_interval(totals: np.ndarray, num_bytes: float) -> tuple[float, float] | None:
    """95 % interval of the bits per byte over draws, given these rows; None if there was one draw.

    Normal approximation from the spread between whole draws; the strata make it conservative.
    """
    if len(totals) < 2:
        return None
    half = 1.96 * totals.std(ddof=1) / math.sqrt(len(totals))
    return bits_per_byte(totals.mean() - half, num_bytes), bits_per_byte(totals.mean() + half, num_bytes)


def documents_interval(nats: np.ndarray, num_bytes: np.ndarray, seed: int = 0) -> tuple[float, float] | None:
    """95 % bootstrap interval of sum(nats) / sum(bytes) in bits, over documents; None if fewer than two of them have text.

    Args:
        nats: [documents]; for a paired comparison, the difference between two models document by document.
        num_bytes: [documents].
        seed: of the resampling.
    """
    if np.count_nonzero(num_bytes) < 2:
        return None  # a resample of one document is that document: what others would have given cannot be known
    random = np.random.default_rng(seed)
    counts = random.multinomial(
        len(nats), np.full(len(nats), 1 / len(nats)), size=NUM_RESAMPLES
    )  # [resamples, documents]
    total_bytes = counts @ num_bytes
    has_text = total_bytes > 0
    ratios = (counts @ nats)[has_text] / total_bytes[has_text] / math.log(2)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)


def by_document(values: np.ndarray, documents: np.ndarray) -> Any:
    """Sums of [N, L] values over each document [N, L] (numbered from 0, -1 for none): [documents]."""
    keep = documents >= 0
    return np.bincount(documents[keep], weights=values[keep], minlength=int(documents.max()) + 1)
