"""Block diffusion: BD3-LM (arXiv 2503.09573, Eq. 8), autoregressive over blocks of K, masked diffusion within each.

L(x_0) = sum_b E_{t_b, x_t^b ~ q(.|x_0^b)} [ w(t_b) * sum_{n in b: x_t^n masked} -log p(x_0^n | x_t^b, x_0^{<b}) ]

in nats per sequence. One pass over [x_t ; x_0] trains all blocks: a block of x_t sees itself and the clean blocks
before it. With shift, the clean hidden state before a block predicts the block's first position, and x_t's hidden
states predict all others. K = 1 with shift and every token masked is the autoregressive model; K = L is masked
diffusion.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dlm_ray.diffusion.absorbing import Absorbing, Process, build_process
from dlm_ray.diffusion.denoiser import Batch, CanvasKind, Denoiser, NetworkFacts, Objective, nll_of
from dlm_ray.diffusion.draws import BLOCK_TIME, Draw, DrawKey, generator
from dlm_ray.diffusion.objectives.auxiliary import AuxiliaryLosses
from dlm_ray.diffusion.objectives.masked import Masked, loss_options
from dlm_ray.diffusion.settings import ObjectiveSettings
from dlm_ray.diffusion.visibility import Visibility


class Block(Masked):
    """The bound of block diffusion, with one time per block.

    Args:
        process, normalize_by, draws_per_sequence, auxiliary: as in `Masked`.
        block_tokens: K, at which the bound is evaluated; a step may train at another K (`DrawKey.block_tokens`).
        context: the tokens of earlier blocks that a block sees in training: `clean` x_0; `clean_causal`, x_0 with the
            causal attention of the AR base, so that its hidden states stay those of an AR model, which the AR loss
            trains without a pass of its own (NBDiff, arXiv 2512.06776); or `noisy` x_t (one pass over x_t; BD3-LM's
            ablation). The bound always uses x_0, as a sampler does.
        passes: `one` pass over [x_t ; x_0], or `two`: x_0 first, then x_t over its keys and values, with equal results.
    """

    kind = "block"
    canvas: CanvasKind = "block"

    def __init__(
        self,
        process: Process | None = None,
        normalize_by: str = "all_tokens",
        draws_per_sequence: int = 1,
        auxiliary: AuxiliaryLosses | None = None,
        *,
        block_tokens: int,
        context: Literal["clean", "clean_causal", "noisy"] = "clean",
        passes: Literal["one", "two"] = "one",
    ):
        super().__init__(process, normalize_by, draws_per_sequence, auxiliary)
        self.block_tokens, self.context, self.passes = block_tokens, context, passes
        # Counted masks of a block of one token have no randomness: the bound is the likelihood there.
        self.likelihood = "exact" if block_tokens == 1 and isinstance(self.process, Absorbing) else "bound"

    @classmethod
    def build(cls, settings: ObjectiveSettings, facts: NetworkFacts) -> Block:
        """Return the objective for a recipe's `objective` section."""
        block_tokens = settings["block_tokens"]
        assert block_tokens is not None, "a recipe of block diffusion has `objective.block_tokens`"
        process = build_process(settings, facts)
        return cls(process, block_tokens=block_tokens, context=settings["context"], **loss_options(settings))

    def draw(self, key: DrawKey, x_0: np.ndarray, maskable: np.ndarray) -> Draw:
        """Return the draw of the process, with one t per block.

        Raises:
            ValueError: if the sequences are not whole blocks.
        """
        block_tokens = key.block_tokens or self.block_tokens
        _check_whole(maskable.shape[1], block_tokens)
        return self.process.draw(replace(key, block_tokens=block_tokens), maskable)

    def evaluation_draw(
        self, seed: int, keys: Sequence[tuple[int, int]], t: np.ndarray, x_0: np.ndarray, maskable: np.ndarray
    ) -> Draw:
        """Return counted masks at times (t + u_b) mod 1, with one uniform u_b per sequence and block.

        Strata over draws stay strata in every block. With the absorbing process, counting integrates over t whatever
        the schedule is, and K = 1 has no randomness. A position's draws do not depend on what follows its block, so
        padding changes none of them (`likelihood.pad_to_blocks`).

        Raises:
            ValueError: if the sequences are not whole blocks.
        """
        _check_whole(x_0.shape[1], self.block_tokens)
        num_blocks = x_0.shape[1] // self.block_tokens
        turns = np.stack(
            [generator(seed, BLOCK_TIME, 0, sequence).random(num_blocks) for _, sequence in keys]
        )  # [B, blocks]
        t = (t[:, None] + turns) % 1.0
        if isinstance(self.process, Absorbing):
            return Absorbing(mask_sampler="count").draw_at(seed, keys, t, maskable)
        return self.process.evaluation_draw(seed, keys, t, maskable)

    def token_nll(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        """Return [R] nats: -log p(x_0^n | x_t^b, x_0^{<b}) at the masked positions n."""
        rows, _ = self._rows(denoiser, batch, "clean" if self.context == "noisy" else self.context)
        return nll_of(denoiser, rows, batch)

    def rows(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        """Return [R, D]: the hidden states that predict the masked positions in training."""
        return self._rows(denoiser, batch, self.context)[0]

    def rows_and_context(self, denoiser: Denoiser, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return `rows`, and the hidden states [B, L, D] of x_0 where the same pass computes them causally."""
        rows, clean = self._rows(denoiser, batch, self.context)
        return rows, clean if is_context_causal(self) else None

    def _rows(self, denoiser: Denoiser, batch: Batch, context: str) -> tuple[Tensor, Tensor | None]:
        """Return [R, D] for the masked positions, and the hidden states [B, L, D] of x_0 if there is a pass over it."""
        block_tokens = _block_tokens(batch)
        length = batch.x_0.shape[1]
        predicting = denoiser.rows_for(batch.draw.scored)  # in [B, L]: the position's own block or the one before
        if context != "noisy" and block_tokens < length:
            if block_tokens == 1 and _predicts_next(denoiser):
                # Only hidden states of x_0 predict tokens, and they see only the past: the autoregressive model.
                clean = denoiser.hidden(batch.x_0, replace(batch.visibility, pattern="causal"))
                return clean.flatten(0, 1)[predicting], clean
            if self.passes == "two":
                return next(self._rows_of_draws(denoiser, batch, [batch.draw])), None
            halves = self._halves(batch, block_tokens)
            hidden = denoiser.hidden(
                torch.cat([self.process.inputs(denoiser, batch), batch.x_0], 1), halves
            )  # [B, 2L, D]
            rows = hidden.flatten(0, 1)[_in_halves(predicting, batch.draw.scored, block_tokens, length)]
            return rows, hidden[:, length:]
        visibility = (
            batch.visibility if block_tokens == length else replace(batch.visibility, block_tokens=block_tokens)
        )
        return denoiser.hidden(self.process.inputs(denoiser, batch), visibility).flatten(0, 1)[predicting], None

    def _halves(self, batch: Batch, block_tokens: int) -> Visibility:
        """Return the visibility of [x_t ; x_0] for blocks of `block_tokens`."""
        return replace(
            batch.visibility,
            block_tokens=block_tokens,
            half=batch.x_0.shape[1],
            is_context_causal=is_context_causal(self),
        )

    def nll_of_draws(self, denoiser: Denoiser, batch: Batch, draws: Sequence[Draw]) -> list[Tensor]:
        """Return [R] nats for each of several draws of the same sequences, which share one pass over x_0."""
        rows = self._rows_of_draws(denoiser, batch, draws)
        return [nll_of(denoiser, scored, replace(batch, draw=draw)) for scored, draw in zip(rows, draws, strict=True)]

    def _rows_of_draws(self, denoiser: Denoiser, batch: Batch, draws: Sequence[Draw]) -> Iterator[Tensor]:
        """Yield [R, D] for each draw: x_t over the keys and values of one pass over x_0."""
        block_tokens, length = _block_tokens(batch), batch.x_0.shape[1]
        halves = self._halves(batch, block_tokens)
        of_x_0 = replace(halves, half=None, pattern="causal" if halves.is_context_causal else halves.pattern)
        clean, kv = denoiser.forward_with_kv(batch.x_0, of_x_0)
        for draw in draws:
            x_t = self.process.inputs(denoiser, replace(batch, draw=draw))
            hidden = torch.cat([denoiser.hidden(x_t, halves, kv), clean], 1)  # [B, 2L, D]
            yield hidden.flatten(0, 1)[_in_halves(denoiser.rows_for(draw.scored), draw.scored, block_tokens, length)]


def is_context_causal(objective: Objective) -> bool:
    """Return whether the objective's finished blocks attend causally, in training and when they are sampled."""
    return isinstance(objective, Block) and objective.context == "clean_causal"


def _check_whole(num_positions: int, block_tokens: int) -> None:
    """Raise ValueError if a sequence is not a whole number of blocks."""
    if num_positions % block_tokens:
        raise ValueError(
            f"sequences of {num_positions} positions are not a whole number of blocks of {block_tokens}; pad them to "
            f"{num_positions + -num_positions % block_tokens} with document id -1"
        )


def _block_tokens(batch: Batch) -> int:
    """Return K of a batch, whose draw has one time per block."""
    return batch.draw.maskable.numel() // batch.draw.t.numel()


def _in_halves(predicting: Tensor, scored: Tensor, block_tokens: int, length: int) -> Tensor:
    """Return [R] flat indices into [B, 2L] for those into [B, L]; one before the position's block points into x_0."""
    is_before = predicting // block_tokens != scored // block_tokens
    return predicting // length * (2 * length) + predicting % length + length * is_before


def _predicts_next(denoiser: Denoiser) -> bool:
    """Return whether the hidden state at n - 1 predicts position n, without waiting for a device."""
    return int(denoiser.rows_for(torch.tensor(1))) == 0
