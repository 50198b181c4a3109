"""The absorbing forward process q(x_t | x_0): every token is, alone, either still itself or the mask.

A forward process is an argument of the objective. It makes the randomness of rows (`draw`), and says what the network sees of them
(`inputs`); what is learned from that is the objective's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from dlm_ray.diffusion.denoiser import Batch, Denoiser
from dlm_ray.diffusion.draws import COUNT, EVALUATION_MASK, MASK, Draw, DrawKey, generator, make_draw, times, uniforms
from dlm_ray.diffusion.schedules import Polynomial, Schedule

_FREE = 1e-3  # a clip's lower end up to here enforces nothing


class Process(Protocol):
    """A forward process: absorbing, or somebody's own (uniform, mask-and-replace, Gaussian)."""

    def draw(self, key: DrawKey, maskable: np.ndarray) -> Draw:
        """The randomness of the rows of `key` in training, and the weight of every scored position; a t for every block of `key.block_tokens`."""

    def evaluation_draw(self, seed: int, keys: Sequence[tuple[int, int]], t: np.ndarray, maskable: np.ndarray) -> Draw:
        """The same for a bound, at given times [B] or [B, blocks]: over the full range, with the ELBO's weights."""

    def inputs(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        """What the network sees of x_t: [B, L] ids, or [B, L, D] embeddings."""


@dataclass(frozen=True)
class Clip:
    """Training on t in [beta, omega] alone (BD3-LM, section 4.2); with the linear schedule t is the mask probability."""

    beta: float
    omega: float
    weight: Literal["unbiased", "paper"] = "unbiased"
    """`unbiased`: the ELBO's integral over [beta, omega], density 1 / (omega - beta) divided out. `paper`: BD3-LM's code, which leaves that
    constant away, and weighs flat where beta > 0.5."""
    enforce: Literal["none", "counts"] = "none"
    """`counts`: as many tokens of a block are masked as keep its masked share within [beta, omega], which is what BD3-LM's rejection loop ends
    with: drawn at once from the truncated binomial. A bound of at most 1e-3, or of 1, is not enforced. The weights stay, so that the expectation is
    no longer the bound's; in training alone."""

    @property
    def constant(self) -> float:
        """What every weight is multiplied with."""
        return self.omega - self.beta if self.weight == "unbiased" else 1.0

    def counts(self, num_maskable: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The least and the largest number of masked tokens that is enforced for blocks of so many; the nearest to the middle if none fits."""
        least = np.where(self.beta <= _FREE, 0, np.ceil(self.beta * num_maskable - 1e-9)).astype(np.int64)
        most = np.where(self.omega >= 1, num_maskable, np.floor(self.omega * num_maskable + 1e-9)).astype(np.int64)
        nearest = np.clip(
            np.rint((self.beta + self.omega) / 2 * num_maskable), np.minimum(1, num_maskable), num_maskable
        ).astype(np.int64)
        fits = least <= most
        return np.where(fits, least, nearest), np.where(fits, most, nearest)


@dataclass(frozen=True)
class Absorbing:
    """Independent masks, and the ELBO's weights: -alpha'/(1 - alpha) in continuous time, T (alpha_s - alpha_t)/(1 - alpha_t) at T times."""

    schedule: Schedule = Polynomial()
    times: str = "stratified"
    mask_sampler: Literal["bernoulli", "count"] = "bernoulli"
    """`count`: k uniform in 1..N, a uniform subset of k of the row's N tokens, weight N / k: t integrated out, never nothing masked
    (ARDM's loss, arXiv 2110.02037, Eq. 3)."""
    num_timesteps: int | None = None
    """T of discrete time; None: continuous."""
    clip: Clip | None = None
    weight: Literal["elbo", "flat", "time"] = "elbo"
    """DiffuLLaMA's three: 1/t in the paper (`elbo` with the linear schedule), 1, and the t of its first 7B script."""
    complementary: bool = False
    """Row 2i+1 of a batch masks exactly what row 2i left clean."""
    context_weights: float | None = None
    """p of Dream's CART: a masked token weighs (1/2) sum over clean tokens at distance d of p (1 - p)^(d - 1)."""

    def draw(self, key: DrawKey, maskable: np.ndarray) -> Draw:
        """Times as `times` says, masks, weights."""
        is_complement = np.array([self.complementary and row % 2 == 1 for row in key.rows])
        assert not self.complementary or key.global_batch_size % 2 == 0, "rows come in pairs"
        if self.complementary:  # a pair shares one t and one set of coins
            assert key.global_batch_size % 2 == 0 and self.clip is None, (
                "pairs need an even number of rows, and both ends of t"
            )
            key = replace(key, rows=[row // 2 for row in key.rows], global_batch_size=key.global_batch_size // 2)
        num_positions = maskable.shape[1]
        t = times(self.times, key, num_positions // (key.block_tokens or num_positions))  # [B, blocks]
        if self.clip is not None:
            t = self.clip.beta + (self.clip.omega - self.clip.beta) * t
        return self._draw(key.seed, MASK, [(key.step, row) for row in key.rows], t, maskable, is_complement)

    def evaluation_draw(self, seed: int, keys: Sequence[tuple[int, int]], t: np.ndarray, maskable: np.ndarray) -> Draw:
        """The masks of pairs (number of the draw, row) at given times [B] or [B, blocks], and the weights of a bound that is whole.

        Whatever training did is left out: the masks are independent, by the linear schedule in continuous time from alpha(0) = 1 to
        alpha(1) = 0. The bound of every such schedule is the same, and has neither a reconstruction nor a prior term.
        """
        whole = replace(
            self,
            schedule=Polynomial(),
            mask_sampler="bernoulli",
            num_timesteps=None,
            clip=None,
            weight="elbo",
            complementary=False,
            context_weights=None,
        )
        return whole.draw_at(seed, keys, t, maskable)

    def draw_at(self, seed: int, keys: Sequence[tuple[int, int]], t: np.ndarray, maskable: np.ndarray) -> Draw:
        """The masks of pairs (number of the draw, row) at given times by this process' own schedule, timesteps, sampler and weights.

        With shifted ends, or the geometric schedule, its sum is a part of the bound (`schedules.reconstruction_nats`, `prior_nats`).
        """
        return self._draw(
            seed, EVALUATION_MASK, keys, t.reshape(len(keys), -1), maskable, np.zeros(len(keys), dtype=bool)
        )

    def inputs(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        """[B, L]: the mask token where masked, x_0 elsewhere."""
        assert denoiser.mask_id is not None, "masked diffusion needs a network with a mask token"
        return torch.where(batch.draw.is_masked, denoiser.mask_id, batch.x_0)

    def _draw(
        self,
        seed: int,
        stream: int,
        keys: Sequence[tuple[int, int]],
        t: np.ndarray,
        maskable: np.ndarray,
        is_complement: np.ndarray,
    ) -> Draw:
        shape, num_blocks = maskable.shape, t.shape[1]
        block = (-1, shape[1] // num_blocks)
        # From here on a block is a row: t [B * blocks], the others [B * blocks, K].
        uniform, maskable, t = uniforms(seed, stream, keys, shape[1]).reshape(block), maskable.reshape(block), t.ravel()
        is_complement = is_complement.repeat(num_blocks)
        if self.mask_sampler == "count":
            is_masked, weight = _counted(uniform, t, maskable)
        else:
            if self.num_timesteps is not None:
                t = np.minimum(np.floor(t * self.num_timesteps) + 1, self.num_timesteps) / self.num_timesteps
            probability = self.schedule.mask_probability(torch.from_numpy(t)).numpy()
            if self.clip is not None and self.clip.enforce == "counts":
                uniform_numbers = np.stack(
                    [generator(seed, COUNT, step, row).random(num_blocks) for step, row in keys]
                ).ravel()
                is_masked = _smallest(
                    uniform, _truncated_binomial(uniform_numbers, probability, maskable.sum(1), self.clip), maskable
                )
            else:
                is_masked = (uniform < probability[:, None]) ^ is_complement[:, None]
            is_masked &= maskable
            weight = self.weights(t, is_complement)
        weights = np.broadcast_to(weight[:, None], maskable.shape)
        if self.context_weights is not None:
            weights = weights * _context(is_masked, maskable, self.context_weights)
        scored = np.flatnonzero(is_masked)
        weights = weights.ravel()[scored] if len(scored) else np.empty(0)
        t = t if num_blocks == 1 else t.reshape(shape[0], num_blocks)
        return make_draw(t, is_masked.reshape(shape), scored, weights, maskable.reshape(shape))

    def weights(self, t: np.ndarray, is_complement: np.ndarray) -> np.ndarray:
        """[B] times -> [B] the weight of a row's masked tokens."""
        times_ = torch.from_numpy(t)  # [B] float64
        if self.weight == "flat" or (self.clip is not None and self.clip.weight == "paper" and self.clip.beta > 0.5):
            return np.ones(len(t))
        if self.weight == "time":
            return t
        if self.num_timesteps is not None:
            now = self.schedule.mask_probability(times_).numpy()
            then = self.schedule.mask_probability(step_before(times_, self.num_timesteps)).numpy()
            return self.num_timesteps * (now - then) / now
        weight = self.schedule.weight(times_).numpy()
        if is_complement.any():
            # Masked with probability alpha(t), which has the density 1 / |alpha'|: the bound over mask probabilities p, weight 1 / p.
            rate = (-self.schedule.alpha_prime(times_) / self.schedule.alpha(times_)).numpy()
            weight = np.where(is_complement, rate, weight)
        return weight if self.clip is None else weight * self.clip.constant


def _counted(uniform: np.ndarray, t: np.ndarray, maskable: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Masks [B, L] of exactly k = floor(t N) + 1 of a row's N maskable tokens, those with the smallest numbers; weights N / k [B].

    A t in strata gives a k in strata.
    """
    num_maskable = maskable.sum(1)
    k = np.minimum(np.floor(t * num_maskable) + 1, np.maximum(num_maskable, 1))
    return _smallest(uniform, k, maskable), num_maskable / k


def _smallest(uniform: np.ndarray, k: np.ndarray, maskable: np.ndarray) -> np.ndarray:
    """[B, L] bool: the k [B] maskable positions of each row that have the smallest numbers."""
    rank = np.where(maskable, uniform, 2.0).argsort(1).argsort(1)
    return (rank < k[:, None]) & maskable


def _truncated_binomial(uniform_numbers: np.ndarray, p: np.ndarray, num_trials: np.ndarray, clip: Clip) -> np.ndarray:
    """[B] counts of Binomial(num_trials, p) given that they lie within the clip's, by inversion of one uniform number each."""
    least, most = clip.counts(num_trials)
    k = torch.arange(int(num_trials.max(initial=0)) + 1, dtype=torch.float64)
    trials, probability = (
        torch.from_numpy(num_trials).double()[:, None],
        torch.from_numpy(p)[:, None].clamp(1e-300, 1 - 1e-16),
    )
    log_choose = torch.lgamma(trials + 1) - torch.lgamma(k + 1) - torch.lgamma((trials - k).clamp(min=0) + 1)
    log_mass = log_choose + k * probability.log() + (trials - k) * torch.log1p(-probability)
    allowed = (k >= torch.from_numpy(least)[:, None]) & (k <= torch.from_numpy(most)[:, None])
    mass = log_mass.masked_fill(~allowed, -torch.inf).softmax(1).cumsum(1)
    return (
        torch.searchsorted(mass, torch.from_numpy(uniform_numbers)[:, None], right=True)[:, 0]
        .clamp(max=len(k) - 1)
        .numpy()
    )


def _context(is_masked: np.ndarray, maskable: np.ndarray, p: float) -> np.ndarray:
    """[B, L]: (1/2) sum over the document's clean tokens at distance d of p (1 - p)^(d - 1), by one recursion from each side."""
    total = np.zeros(is_masked.shape)
    for direction in (1, -1):
        clean, text = ~is_masked[:, ::direction], maskable[:, ::direction]
        near = np.zeros(len(is_masked))
        for n in range(is_masked.shape[1]):
            total[:, ::direction][:, n] += near
            near = text[:, n] * ((1 - p) * near + p * clean[:, n])  # what is not text begins another document
    return total / 2


def step_before(t: Tensor, num_timesteps: int) -> Tensor:
    """Times t in 1/T .. 1 -> s = t - 1/T, exactly 0 for the first."""
    return (torch.round(t * num_timesteps) - 1) / num_timesteps
