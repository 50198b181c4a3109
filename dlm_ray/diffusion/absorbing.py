"""The absorbing forward process q(x_t | x_0): every token is, independently, either still itself or the mask.

A forward process is an argument of the objective. It makes the randomness of sequences (`draw`) and the network's input
(`inputs`); the objective computes the loss from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from dlm_ray.diffusion import schedules
from dlm_ray.diffusion.denoiser import Batch, Denoiser, NetworkFacts
from dlm_ray.diffusion.draws import COUNT, EVALUATION_MASK, MASK, Draw, DrawKey, generator, make_draw, times, uniforms
from dlm_ray.diffusion.schedules import Polynomial, Schedule
from dlm_ray.diffusion.settings import ObjectiveSettings

_FREE = 1e-3  # a lower end of a clip up to this value enforces nothing


class Process(Protocol):
    """A forward process: absorbing, or a custom one (uniform, mask-and-replace, Gaussian).

    A custom process (`objective.process: package.module:Class`) meets this protocol. If it is a torch module, its
    parameters are part of the objective's: trained, saved as `objective.process.*` and restored.
    """

    @classmethod
    def build(cls, settings: ObjectiveSettings, facts: NetworkFacts) -> Process:
        """Return the process for a recipe's `objective` section, as `Objective.build` gets it."""

    def draw(self, key: DrawKey, maskable: np.ndarray) -> Draw:
        """Return the randomness of the draws of `key` in training, with one t per block of `key.block_tokens`."""

    def evaluation_draw(self, seed: int, keys: Sequence[tuple[int, int]], t: np.ndarray, maskable: np.ndarray) -> Draw:
        """Return the randomness for a bound at given times [B] or [B, blocks]: full range, with the ELBO's weights."""

    def inputs(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        """Return the network's input for x_t: [B, L] ids, or [B, L, D] embeddings."""


@dataclass(frozen=True)
class Clip:
    """Training on t in [beta, omega] only (BD3-LM, section 4.2); with the linear schedule t is the mask probability."""

    beta: float
    omega: float
    weight: Literal["unbiased", "paper"] = "unbiased"
    """`unbiased`: the ELBO's integral over [beta, omega], divided by the density 1 / (omega - beta). `paper`: the
    weights of BD3-LM's code, which omits that constant and has weight 1 if beta > 0.5."""
    enforce: Literal["none", "counts"] = "none"
    """`counts`: the masked share of every block is within [beta, omega], the result of BD3-LM's rejection loop; the
    count is drawn from the truncated binomial. A bound of at most 1e-3, or of 1, is not enforced. The weights do not
    change, so the expectation is no longer the ELBO's. It applies in training only."""

    @property
    def constant(self) -> float:
        """Return the factor of every weight."""
        return self.omega - self.beta if self.weight == "unbiased" else 1.0

    def counts(self, num_maskable: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the least and the largest enforced number of masked tokens for blocks of `num_maskable` tokens [B].

        Both are the number nearest to the middle of the interval if no whole number fits.
        """
        least = np.where(self.beta <= _FREE, 0, np.ceil(self.beta * num_maskable - 1e-9)).astype(np.int64)
        most = np.where(self.omega >= 1, num_maskable, np.floor(self.omega * num_maskable + 1e-9)).astype(np.int64)
        nearest = np.clip(
            np.rint((self.beta + self.omega) / 2 * num_maskable), np.minimum(1, num_maskable), num_maskable
        ).astype(np.int64)
        fits = least <= most
        return np.where(fits, least, nearest), np.where(fits, most, nearest)


@dataclass(frozen=True)
class Absorbing:
    """Independent masks with the ELBO's weights.

    The weights are -alpha'/(1 - alpha) in continuous time, and T (alpha_s - alpha_t)/(1 - alpha_t) at T discrete times.
    """

    schedule: Schedule = Polynomial()
    """alpha(t)."""
    times: str = "stratified"
    """Mode of the times, as in `draws.times`."""
    mask_sampler: Literal["bernoulli", "count"] = "bernoulli"
    """`count`: k uniform in 1..N, a uniform subset of k of the sequence's N tokens, weight N / k. It integrates over t
    and always masks (ARDM's loss, arXiv 2110.02037, Eq. 3)."""
    num_timesteps: int | None = None
    """T of discrete time; None: continuous."""
    clip: Clip | None = None
    """Interval of t; None: the full range."""
    weight: Literal["elbo", "flat", "time"] = "elbo"
    """DiffuLLaMA's three: 1/t in the paper (`elbo` with the linear schedule), 1, and the t of its first 7B script."""
    complementary: bool = False
    """Draw 2i+1 of a batch masks exactly what draw 2i leaves clean."""
    context_weights: float | None = None
    """p of Dream's CART: a masked token weighs (1/2) sum over clean tokens at distance d of p (1 - p)^(d - 1)."""

    @classmethod
    def build(cls, settings: ObjectiveSettings, facts: NetworkFacts) -> Absorbing:
        """Return the process for a recipe's `objective` section."""
        return cls(
            schedule=schedules.build(**settings["schedule"]),
            times=settings["times"],
            mask_sampler=settings["mask_sampler"],
            num_timesteps=settings["num_timesteps"],
            clip=Clip(**settings["clip"]) if settings["clip"] else None,
            weight=settings["weight"],
            complementary=settings["complementary"],
            context_weights=settings["context_weights"],
        )

    def draw(self, key: DrawKey, maskable: np.ndarray) -> Draw:
        """Return times in the mode `times`, masks and weights."""
        is_complement = np.array([self.complementary and index % 2 == 1 for index in key.indices])
        assert not self.complementary or key.global_batch_size % 2 == 0, "draws come in pairs"
        if self.complementary:  # a pair shares one t and one set of uniform numbers
            assert key.global_batch_size % 2 == 0 and self.clip is None, (
                "pairs need an even number of draws, and both ends of t"
            )
            key = replace(
                key, indices=[index // 2 for index in key.indices], global_batch_size=key.global_batch_size // 2
            )
        num_positions = maskable.shape[1]
        t = times(self.times, key, num_positions // (key.block_tokens or num_positions))  # [B, blocks]
        if self.clip is not None:
            t = self.clip.beta + (self.clip.omega - self.clip.beta) * t
        return self._draw(key.seed, MASK, [(key.step, index) for index in key.indices], t, maskable, is_complement)

    def evaluation_draw(self, seed: int, keys: Sequence[tuple[int, int]], t: np.ndarray, maskable: np.ndarray) -> Draw:
        """Return masks of pairs (number of the draw, sequence) at times [B] or [B, blocks], with the bound's weights.

        The settings of training do not enter: the masks are independent, by the linear schedule in continuous time from
        alpha(0) = 1 to alpha(1) = 0. The bound of every such schedule is the same, without a reconstruction or prior
        term.
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
        """Return the masks of pairs (number of the draw, sequence) at given times, with this process's own settings.

        With shifted ends, or the geometric schedule, the bound has two more terms: `schedules.reconstruction_nats`
        and `prior_nats`.
        """
        return self._draw(
            seed, EVALUATION_MASK, keys, t.reshape(len(keys), -1), maskable, np.zeros(len(keys), dtype=bool)
        )

    def inputs(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        """Return [B, L]: the mask token where masked, x_0 elsewhere."""
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
        # From here on the first dimension counts blocks: t [B * blocks], the others [B * blocks, K].
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
                    [generator(seed, COUNT, step, index).random(num_blocks) for step, index in keys]
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
        """Return [B], the weights of the masked tokens at times t [B]."""
        time = torch.from_numpy(t)  # [B] float64
        if self.weight == "flat" or (self.clip is not None and self.clip.weight == "paper" and self.clip.beta > 0.5):
            return np.ones(len(t))
        if self.weight == "time":
            return t
        if self.num_timesteps is not None:
            now = self.schedule.mask_probability(time).numpy()
            then = self.schedule.mask_probability(step_before(time, self.num_timesteps)).numpy()
            return np.asarray(self.num_timesteps * (now - then) / now)
        weight: np.ndarray = self.schedule.weight(time).numpy()
        if is_complement.any():
            # The mask probability p is alpha(t), with density 1 / |alpha'|: the bound over p has weight 1 / p.
            rate = (-self.schedule.alpha_prime(time) / self.schedule.alpha(time)).numpy()
            weight = np.where(is_complement, rate, weight)
        return weight if self.clip is None else np.asarray(weight * self.clip.constant)


def _counted(uniform: np.ndarray, t: np.ndarray, maskable: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return masks [B, L] of exactly k = floor(t N) + 1 of a sequence's N maskable tokens, and weights N / k [B].

    The tokens with the smallest uniform numbers are masked. A stratified t gives a stratified k.
    """
    num_maskable = maskable.sum(1)
    k = np.minimum(np.floor(t * num_maskable) + 1, np.maximum(num_maskable, 1))
    return _smallest(uniform, k, maskable), num_maskable / k


def _smallest(uniform: np.ndarray, k: np.ndarray, maskable: np.ndarray) -> np.ndarray:
    """Return [B, L] bool: the k [B] maskable positions of each sequence with the smallest uniform numbers."""
    rank = np.where(maskable, uniform, 2.0).argsort(1).argsort(1)
    is_smallest: np.ndarray = (rank < k[:, None]) & maskable
    return is_smallest


def _truncated_binomial(uniform_numbers: np.ndarray, p: np.ndarray, num_trials: np.ndarray, clip: Clip) -> np.ndarray:
    """Return [B] counts of Binomial(num_trials, p), truncated to the clip's counts, by inversion of uniform numbers."""
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
    """Return [B, L]: (1/2) sum over the document's clean tokens at distance d of p (1 - p)^(d - 1).

    One recursion from each side computes it.
    """
    total = np.zeros(is_masked.shape)
    for direction in (1, -1):
        clean, text = ~is_masked[:, ::direction], maskable[:, ::direction]
        near = np.zeros(len(is_masked))
        for n in range(is_masked.shape[1]):
            total[:, ::direction][:, n] += near
            near = text[:, n] * (
                (1 - p) * near + p * clean[:, n]
            )  # a position that is not text starts another document
    return total / 2


def build_process(settings: ObjectiveSettings, facts: NetworkFacts) -> Process:
    """Return the forward process of a recipe's `objective` section: its custom class, or the absorbing process."""
    process_class: type[Process] = settings["process"] or Absorbing
    return process_class.build(settings, facts)


def step_before(t: Tensor, num_timesteps: int) -> Tensor:
    """Return s = t - 1/T for times t in 1/T .. 1; exactly 0 for the first."""
    return (torch.round(t * num_timesteps) - 1) / num_timesteps
