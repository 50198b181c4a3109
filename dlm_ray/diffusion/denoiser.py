"""The seam between the papers and the networks: what a denoiser answers, what an objective is given, what it returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from dlm_ray.diffusion.draws import Draw, DrawKey
from dlm_ray.diffusion.visibility import Visibility


class Cache(Protocol):
    """Keys and values of committed blocks, a slot a request; slots in use are the first ones."""

    lengths: list[int]
    """Committed positions of every slot."""
    last_rows: Tensor
    """[slots, D]: the hidden row of every slot's last committed position, which with shift predicts the next block's first."""

    def commit(self, slot: int, num_tokens: int, last_row: Tensor) -> None:
        """The next `num_tokens` positions of a slot, as the last pass wrote them, stay; `last_row` [D] is the last one's hidden row."""

    def part(self, first: int, count: int) -> Cache:
        """The slots from `first` on as a cache for one pass over them alone; what it wrote is committed to the whole cache."""

    def save(self, slot: int, start: int, num_tokens: int) -> Tensor:
        """A copy of the keys and values of so many committed positions, [..., n, D/H]."""

    def restore(self, slot: int, saved: Sequence[Tensor], last_row: Tensor) -> None:
        """Begins an empty slot with what `save` gave, one behind the other; `last_row` [D] is the hidden row of the last position."""

    def fork(self, source: int, target: int) -> None:
        """Makes slot `target` a copy of slot `source`."""

    def release(self, slot: int) -> None:
        """Empties a slot."""


class Denoiser(Protocol):
    """A network that turns a partly masked row into hidden rows, and hidden rows into whatever of the logits is asked for."""

    mask_id: int | None
    """None if it is autoregressive only."""

    def hidden(self, inputs: Tensor, visibility: Visibility, kv: Any = None) -> Tensor:
        """[B, L] ids, or [B, L, D] embeddings -> [B, L, D] final hidden states.

        `memory` is a cache of `new_cache`, behind whose first B slots the rows go on, or a recording of `record`, which the rows see.
        """

    def new_cache(self, num_slots: int, capacity_tokens: int, *, fixed_shapes: bool = False) -> Cache:
        """An empty cache; with `fixed_shapes` a pass over it sees as many keys whatever is committed."""

    def forward_with_kv(self, inputs: Tensor, visibility: Visibility) -> tuple[Tensor, Any]:
        """`hidden`, and its keys and values for later passes to see."""

    def states(self, inputs: Tensor, visibility: Visibility) -> tuple[Tensor, ...]:
        """The same with what is below: the embeddings, the states after every block, [B, L, D] each; the last is `hidden`."""

    def embed(self, input_ids: Tensor) -> Tensor:
        """[B, L] ids -> [B, L, D] embeddings."""

    def reduce_logits(self, rows: Tensor, fn: Callable[..., Any], *row_arguments: Tensor) -> Any:
        """Applies fn(logits [n, V] float32, *arguments [n, ...]) chunk by chunk over rows [N, D]; fn's tensors are concatenated over rows.

        The mask token's logit is -inf: it gets no probability.
        """

    def rows_for(self, positions: Tensor) -> Tensor:
        """The hidden rows (flat indices) that predict the tokens at flat `positions`; the only place that knows about the shift."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch, ready for the network."""

    x_0: Tensor
    """[B, L] int64, the clean tokens."""
    draw: Draw
    visibility: Visibility


@dataclass(frozen=True)
class LossSum:
    """Sums and counts, never means: the training step divides once, by the count over all ranks and micro-batches."""

    weighted_sum: Tensor
    """Scalar, nats; what is differentiated."""
    by_name: dict[str, Tensor] = field(default_factory=dict)
    """Detached scalar sums over scored positions, to log; the step divides them by the global number of scored positions."""
    by_token: dict[str, Tensor] = field(default_factory=dict)
    """Detached scalar sums to log that are divided by what the loss is divided by."""
    over_tokens: dict[str, Tensor] = field(default_factory=dict)
    """Scalar sums over all maskable positions that are differentiated and logged, too: each is divided by the global number of maskable
    positions, whatever the loss is divided by."""

    def total(self, count: int, num_maskable: int) -> Tensor:
        """Return the sum to differentiate; the step divides it by `count`, which cancels in the sums that have a divisor of their own.

        Args:
            count: what the loss is divided by: `Objective.count` over the global batch.
            num_maskable: maskable positions of the global batch.
        """
        if not self.over_tokens:
            return self.weighted_sum
        return self.weighted_sum + sum(self.over_tokens.values(), self.weighted_sum.new_zeros(())) * (
            count / max(1, num_maskable)
        )


class Objective(Protocol):
    """What is minimised. Also an nn.Module; its own parameters, if any, are trained, saved and left out of exports."""

    is_causal: bool
    """Whether attention stays causal; otherwise it becomes bidirectional."""
    likelihood: Literal["exact", "bound", "none"]
    """What weight * token_nll sums to over an evaluation draw: -log p(x_0), an upper bound of it, or nothing of the kind."""
    draws_per_sequence: int
    """So many draws of every row are in a batch: copy j of row r is row r * draws_per_sequence + j of a draw's key."""

    def draw(self, key: DrawKey, x_0: Any, maskable: Any) -> Draw:
        """The randomness of the rows of `key`; x_0 [B, L] and maskable [B, L] bool are on the host."""

    def evaluation_draw(self, seed: int, keys: Sequence[tuple[int, int]], t: Any, x_0: Any, maskable: Any) -> Draw:
        """The randomness of pairs (number of the draw, row) at given times t [B], for a bound that is compared between models."""

    def count(self, draw: Draw) -> int:
        """What this micro-batch adds to the count that the loss is divided by."""

    def token_nll(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        """[R] float32: the nats of the scored positions, without weights; -log p(x_0^n | x_t) unless the objective says otherwise."""

    def __call__(self, denoiser: Denoiser, batch: Batch) -> LossSum:
        """The loss of one micro-batch."""


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """[n, V] float32, [n] int64 -> [n]: -log softmax(logits)[target], in nats."""
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def scored_rows(denoiser: Denoiser, hidden: Tensor, draw: Draw) -> Tensor:
    """[B, L, D] -> [R, D]: the hidden rows that predict the scored positions."""
    return hidden.flatten(0, 1)[denoiser.rows_for(draw.scored)]


def reduce_scored(
    denoiser: Denoiser, rows: Tensor, fn: Callable[..., Any], batch: Batch, *row_arguments: Tensor
) -> Any:
    """Apply fn(logits [n, V], targets [n], *row_arguments) to the hidden rows [R, D] that predict the scored positions of `batch`.

    Padding of `draw.scored` gets a row of zeros and a target that has a logit. Its values and gradients are finite whatever the network
    makes of the position that padding points at, so that its weight 0 makes them 0.
    """
    is_padding = ~batch.draw.is_scored
    targets = batch.x_0.flatten()[batch.draw.scored].masked_fill(is_padding, 1 if denoiser.mask_id == 0 else 0)
    return denoiser.reduce_logits(rows.masked_fill(is_padding[:, None], 0.0), fn, targets, *row_arguments)


def nll_of(denoiser: Denoiser, rows: Tensor, batch: Batch) -> Tensor:
    """[R] float32: -log p(x_0) in nats at the scored positions of `batch`, from the hidden rows [R, D] that predict them."""
    nll: Tensor = reduce_scored(denoiser, rows, cross_entropy, batch)
    return nll


def score(denoiser: Denoiser, inputs: Tensor, batch: Batch) -> Tensor:
    """The same after one network call on `inputs`."""
    return nll_of(denoiser, scored_rows(denoiser, denoiser.hidden(inputs, batch.visibility), batch.draw), batch)
