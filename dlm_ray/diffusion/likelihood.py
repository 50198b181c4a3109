"""The likelihood of sequences: exact for an autoregressive model, a bound for a diffusion model; sums and intervals.

A diffusion model's value is the ELBO over the full range of t with alpha(0) = 1 and alpha(1) = 0. So it has no
reconstruction or prior term (GenMD4, whose range starts at t_1, adds its own), and the schedule of training does not
enter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from dlm_ray.diffusion.denoiser import Batch, Denoiser, Objective
from dlm_ray.diffusion.draws import evaluation_times, maskable_positions
from dlm_ray.diffusion.visibility import Visibility, documents_apart

NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class TokenNats:
    """-log p of every token, or its bound, and its spread over draws."""

    nats: np.ndarray
    """[N, L] float64: the mean over draws; 0 where nothing is scored."""
    draw_totals: np.ndarray
    """[draws] float64: the total over sequences for each draw."""


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
    is_given: np.ndarray | None = None,
    keys: Sequence[int] | None = None,
) -> Batch:
    """Return the batch that scores pairs (sequence, number of the draw).

    Args:
        objective: makes the draws.
        x_0, document_ids: [N, L] of all sequences.
        pairs: B pairs; a sequence may be in several.
        times: [N, draws].
        seed: seed of the masks.
        visibility_of: function of the [B, L] document ids of the batch.
        device: device of the network.
        is_real: False scores nothing (a filler that keeps ranks in step).
        is_given, keys: as in `token_nats`.
    """
    sequences = [sequence for sequence, _ in pairs]
    maskable = maskable_positions(document_ids[sequences]) & is_real
    if is_given is not None:
        maskable &= ~is_given[sequences]
    t = np.array([times[pair] for pair in pairs])
    draw_keys = [(number, sequence if keys is None else keys[sequence]) for sequence, number in pairs]
    draw = objective.evaluation_draw(seed, draw_keys, t, x_0[sequences], maskable)
    return Batch(torch.from_numpy(x_0[sequences]).to(device), draw.to(device), visibility_of(document_ids[sequences]))


def block_tokens_of(objective: Objective) -> int:
    """Return K of an objective that generates block by block, and 1 for any other."""
    return int(getattr(objective, "block_tokens", 1)) if objective.canvas == "block" else 1


def num_padding(objective: Objective, sequence_length: int) -> int:
    """Return the number of positions that a sequence lacks to be a whole number of the objective's blocks."""
    return -sequence_length % block_tokens_of(objective)


def pad_to_blocks(objective: Objective, x_0: np.ndarray, document_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return sequences [N, L] and their document ids, padded by `num_padding` positions.

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
    is_given: np.ndarray | None = None,
    keys: Sequence[int] | None = None,
) -> TokenNats:
    """Return the nats of every token of sequences [N, L], or their bound.

    Two models that are scored with the same sequences, seed and draws see the same masks, so they compare in pairs.
    Sequences that are not a whole number of the objective's blocks are padded (`pad_to_blocks`); the text does not see
    the padding, whatever `visibility_of` returns.

    Args:
        denoiser: the network.
        objective: makes the draws and computes the nats.
        x_0, document_ids: [N, L].
        visibility_of: function of the [B, L] document ids of a batch.
        device: device of the network.
        num_draws: draws per sequence, with t in strata; an exact likelihood needs one.
        seed: seed of the draws.
        micro_batch_size: draws per network call.
        progress: called with (draws done, draws).
        is_given: [N, L] bool: tokens that are never masked and not scored, such as a prompt; the nats are then those
            of the other tokens given these, if what is given comes first.
        keys: [N] number of each sequence in the draws, by default its index; sequences of one number share times and
            uniform numbers, so that the choices of a question compare in pairs.
    """
    assert objective.likelihood != "none", "this objective bounds nothing"
    num_draws = 1 if objective.likelihood == "exact" else num_draws
    length = x_0.shape[1]
    x_0, document_ids = pad_to_blocks(objective, x_0, document_ids)
    num_positions = x_0.shape[1]
    if is_given is not None:
        is_given = np.pad(is_given, ((0, 0), (0, num_positions - length)))

    def visible(ids: np.ndarray) -> Visibility:
        visibility = visibility_of(ids)
        if visibility.document_ids is None and num_positions > length:
            return replace(visibility, document_ids=documents_apart(ids, False, device))
        return visibility

    times = evaluation_times(seed, range(len(x_0)) if keys is None else keys, num_draws)
    pairs = [(sequence, number) for sequence in range(len(x_0)) for number in range(num_draws)]
    nats, totals = np.zeros(x_0.shape), np.zeros(num_draws)
    for start in range(0, len(pairs), micro_batch_size):
        batch_pairs = pairs[start : start + micro_batch_size]
        batch = evaluation_batch(
            objective, x_0, document_ids, batch_pairs, times, seed, visible, device, is_given=is_given, keys=keys
        )
        weighted = (
            (batch.draw.weight * objective.token_nll(denoiser, batch)).double().cpu().numpy()[: batch.draw.num_scored]
        )
        scored = batch.draw.scored[: batch.draw.num_scored].cpu().numpy()
        sequences, numbers = np.array(batch_pairs)[scored // num_positions].T
        np.add.at(nats, (sequences, scored % num_positions), weighted / num_draws)
        np.add.at(totals, numbers, weighted)
        if progress is not None:
            progress(start + len(batch_pairs), len(pairs))
    return TokenNats(nats[:, :length], totals)


def bits_per_byte(nats: float, num_bytes: float) -> float:
    """Return nats over raw UTF-8 bytes, in bits."""
    return nats / math.log(2) / num_bytes


def draws_interval(totals: np.ndarray, num_bytes: float) -> tuple[float, float] | None:
    """Return the 95 % interval of the bits per byte over draws, for these sequences; None if there is one draw.

    It is a normal approximation from the spread between whole draws; the strata make it conservative.
    """
    if len(totals) < 2:
        return None
    half = 1.96 * totals.std(ddof=1) / math.sqrt(len(totals))
    return bits_per_byte(totals.mean() - half, num_bytes), bits_per_byte(totals.mean() + half, num_bytes)


def documents_interval(nats: np.ndarray, num_bytes: np.ndarray, seed: int = 0) -> tuple[float, float] | None:
    """Return the 95 % bootstrap interval of sum(nats) / sum(bytes) in bits over documents.

    It is None if fewer than two documents have text.

    Args:
        nats: [documents]; for a paired comparison, the difference between two models document by document.
        num_bytes: [documents].
        seed: seed of the resampling.
    """
    if np.count_nonzero(num_bytes) < 2:
        return None  # every resample of one document is that document, which says nothing about others
    random = np.random.default_rng(seed)
    counts = random.multinomial(
        len(nats), np.full(len(nats), 1 / len(nats)), size=NUM_RESAMPLES
    )  # [resamples, documents]
    total_bytes = counts @ num_bytes
    has_text = total_bytes > 0
    ratios = (counts @ nats)[has_text] / total_bytes[has_text] / math.log(2)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)


def by_document(values: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Return [documents] sums of values [N, L] by document [N, L], numbered from 0; -1 is no document."""
    keep = documents >= 0
    return np.bincount(documents[keep], weights=values[keep], minlength=int(documents.max()) + 1)
