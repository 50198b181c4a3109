"""The interfaces between the papers and the networks: denoiser, cache, objective, and the data that they exchange."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from dlm_ray.diffusion.draws import Draw, DrawKey
from dlm_ray.diffusion.settings import ObjectiveSettings
from dlm_ray.diffusion.visibility import Visibility

CanvasKind = Literal["autoregressive", "block", "whole", "simplex"]
Likelihood = Literal["exact", "bound", "none"]
ReductionT = TypeVar("ReductionT", bound=Tensor | tuple[Tensor, ...])
"""The result of a reduction of logits [n, V]: a tensor [n, ...], or a tuple of such tensors."""


class Cache(Protocol):
    """Keys and values of committed blocks, one slot per request; the slots in use come first."""

    lengths: list[int]
    """Number of committed positions of every slot."""
    last_rows: Tensor
    """[slots, D]: the hidden state of every slot's last committed position; with shift it predicts the next token."""

    def commit(self, slot: int, num_tokens: int, last_row: Tensor) -> None:
        """Keep the next `num_tokens` positions of a slot, as the last pass wrote them.

        Args:
            slot: the slot.
            num_tokens: number of positions.
            last_row: [D], the hidden state of the last position.
        """

    def slot_range(self, first: int, count: int) -> Cache:
        """Return the `count` slots from `first` on, for one pass over them; commits go to the whole cache."""

    def with_lookahead(self, num_slots: int, slots: Sequence[int], num_tokens: int, num_rows: int) -> Cache:
        """Return the first slots for one pass that also runs the block after the next one of some slots.

        A finished block is then committed by the pass that first denoises the next one. Row b < num_slots holds the
        next positions of slot b; row num_slots + i holds those after the positions of row slots[i], which it sees.

        Args:
            num_slots: number of slots in the pass.
            slots: the slots whose following block is in the pass.
            num_tokens: positions of every row.
            num_rows: number of rows after the first `num_slots`; those beyond `slots` are padding.
        """

    def save(self, slot: int, start: int, num_tokens: int) -> Tensor:
        """Return a copy of the keys and values of `num_tokens` committed positions, [..., n, D/H]."""

    def restore(self, slot: int, saved: Sequence[Tensor], last_row: Tensor) -> None:
        """Fill an empty slot with the concatenated results of `save`; `last_row` [D] is the last hidden state."""

    def fork(self, source: int, target: int) -> None:
        """Make slot `target` a copy of slot `source`."""

    def release(self, slot: int) -> None:
        """Empty a slot of the cache."""


class PassKeyValues(Protocol):
    """The keys and values of one finished pass, which later passes attend to."""

    num_keys: int
    """Number of positions of the pass."""


class Denoiser(Protocol):
    """A network that turns partly masked tokens into hidden states, and hidden states into reductions of logits."""

    mask_id: int | None
    """Id of the mask token; None if the network is only autoregressive."""

    def hidden(self, inputs: Tensor, visibility: Visibility, kv: Cache | PassKeyValues | None = None) -> Tensor:
        """Return the final hidden states [B, L, D].

        Args:
            inputs: [B, L] ids, or [B, L, D] embeddings.
            visibility: the keys that every query position sees.
            kv: a cache of `new_cache`, whose first B slots the sequences continue, or keys and values of
                `forward_with_kv`, which the sequences see.
        """

    def new_cache(self, num_slots: int, capacity_tokens: int, *, fixed_shapes: bool = False) -> Cache:
        """Return an empty cache; with `fixed_shapes` a pass over it sees the same number of keys at any length."""

    def forward_with_kv(self, inputs: Tensor, visibility: Visibility) -> tuple[Tensor, PassKeyValues]:
        """Return the result of `hidden`, and its keys and values for later passes."""

    def states(self, inputs: Tensor, visibility: Visibility) -> tuple[Tensor, ...]:
        """Return the embeddings and the states after every layer, [B, L, D] each; the last is `hidden`."""

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return embeddings [B, L, D] of ids [B, L]."""

    def reduce_logits(self, rows: Tensor, fn: Callable[..., ReductionT], *row_arguments: Tensor) -> ReductionT:
        """Apply fn(logits [n, V] float32, *arguments [n, ...]) to rows [N, D] in chunks and concatenate its results.

        The mask token's logit is -inf, so it has no probability.
        """

    def rows_for(self, positions: Tensor) -> Tensor:
        """Return the flat indices of the hidden states that predict the tokens at flat `positions`.

        This is the only function that knows about the shift.
        """


@dataclass(frozen=True)
class NetworkFacts:
    """The properties of a network and its data that an objective may need."""

    vocab_size: int
    """V: the tokens that have a logit; an appended mask token is not among them."""
    width: int
    """D of the hidden states."""
    sequence_length: int
    """Tokens of a training sequence."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch, ready for the network."""

    x_0: Tensor
    """[B, L] int64: the clean tokens."""
    draw: Draw
    visibility: Visibility


@dataclass(frozen=True)
class LossSum:
    """Sums, never means: the training step divides once, by the count over all ranks and micro-batches."""

    weighted_sum: Tensor
    """Scalar in nats, to differentiate."""
    by_name: dict[str, Tensor] = field(default_factory=dict)
    """Detached scalar sums to log; the step divides them by the global number of scored positions."""
    by_token: dict[str, Tensor] = field(default_factory=dict)
    """Detached scalar sums to log; the step divides them by the divisor of the loss."""
    over_tokens: dict[str, Tensor] = field(default_factory=dict)
    """Scalar sums over all maskable positions, to differentiate and to log; the step divides them by the global number
    of maskable positions, whatever the divisor of the loss is."""

    def total(self, count: int, num_maskable: int) -> Tensor:
        """Return the sum to differentiate; the step divides it by `count`, which cancels in `over_tokens`.

        Args:
            count: divisor of the loss: `Objective.count` over the global batch.
            num_maskable: maskable positions of the global batch.
        """
        if not self.over_tokens:
            return self.weighted_sum
        return self.weighted_sum + sum(self.over_tokens.values(), self.weighted_sum.new_zeros(())) * (
            count / max(1, num_maskable)
        )


class Objective(Protocol):
    """The loss that training minimises, and how its networks are sampled and scored; a torch module.

    A custom objective (`objective.name: package.module:Class`) meets this protocol. A subclass of `objectives.Masked`
    or of another built-in class does. Its own parameters are replicated on all ranks, trained, averaged, saved as
    `objective.*` and loaded again by name; buffers are not saved. An optional method `start_from(embedding)` gets the
    network's embedding [rows >= V, D] before the first step.
    """

    kind: str
    """The built-in objective that it extends, such as `masked`; its keys of the recipe and its sampling rules apply."""
    canvas: CanvasKind
    """The unit that a sampler denoises; `block` needs an attribute `block_tokens`, `simplex` the methods of `SsdLm`."""
    is_causal: bool
    """Whether attention stays causal; otherwise it becomes bidirectional."""
    likelihood: Likelihood
    """The sum of weight * token_nll over an evaluation draw: -log p(x_0), an upper bound of it, or neither."""
    draws_per_sequence: int
    """Draws of every sequence in a batch: draw j of sequence i has the index i * draws_per_sequence + j."""

    @classmethod
    def build(cls, settings: ObjectiveSettings, facts: NetworkFacts) -> Objective:
        """Return the objective that trains a network.

        Args:
            settings: the recipe's `objective` section, complete; class paths in it are replaced by the classes.
            facts: of the network and its data.

        Raises:
            ValueError: if the settings do not fit the network.
        """

    @classmethod
    def restore(cls, settings: ObjectiveSettings, facts: NetworkFacts) -> Objective:
        """Return the objective that scores and samples the trained network; its parameters are loaded afterwards.

        Its `evaluation_draw` covers the full range of t, whatever noise training used.
        """

    def draw(self, key: DrawKey, x_0: np.ndarray, maskable: np.ndarray) -> Draw:
        """Return the randomness of the draws of `key`; x_0 [B, L] and maskable [B, L] bool are on the host."""

    def evaluation_draw(
        self, seed: int, keys: Sequence[tuple[int, int]], t: np.ndarray, x_0: np.ndarray, maskable: np.ndarray
    ) -> Draw:
        """Return the randomness of pairs (number of the draw, sequence) at times t [B], for a comparable bound."""

    def count(self, draw: Draw) -> int:
        """Return the contribution of a micro-batch to the count that divides the loss."""

    def token_nll(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        """Return [R] float32 nats of the scored positions, without weights.

        They are -log p(x_0^n | x_t) unless the objective says otherwise.
        """

    def __call__(self, denoiser: Denoiser, batch: Batch) -> LossSum:
        """Return the loss of one micro-batch; a module defines it as `forward`."""

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Return the parameters that are trained in addition to the network; see `nn.Module`."""

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Return the parameters with their names; see `nn.Module`."""

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Set whether the parameters get gradients; see `nn.Module`."""

    def to(self, device: torch.device) -> Self:
        """Move the parameters to `device`; see `nn.Module`."""


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return -log softmax(logits)[target] [n] in nats for logits [n, V] float32 and targets [n] int64."""
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def scored_rows(denoiser: Denoiser, hidden: Tensor, draw: Draw) -> Tensor:
    """Return [R, D]: the hidden states, of [B, L, D], that predict the scored positions."""
    return hidden.flatten(0, 1)[denoiser.rows_for(draw.scored)]


def reduce_scored(
    denoiser: Denoiser, rows: Tensor, fn: Callable[..., ReductionT], batch: Batch, *row_arguments: Tensor
) -> ReductionT:
    """Apply fn(logits [n, V], targets [n], *row_arguments) to the hidden states that predict the scored positions.

    Padding of `draw.scored` gets a hidden state of zeros and a target that has a logit. So its values and gradients are
    finite whatever the network computes at the position that padding points at, and its weight 0 makes them 0.

    Args:
        denoiser: the network.
        rows: [R, D], the hidden states.
        fn: the reduction.
        batch: gives the scored positions and their targets.
        row_arguments: [R, ...] further arguments of `fn`.
    """
    is_padding = ~batch.draw.is_scored
    targets = batch.x_0.flatten()[batch.draw.scored].masked_fill(is_padding, 1 if denoiser.mask_id == 0 else 0)
    return denoiser.reduce_logits(rows.masked_fill(is_padding[:, None], 0.0), fn, targets, *row_arguments)


def nll_of(denoiser: Denoiser, rows: Tensor, batch: Batch) -> Tensor:
    """Return [R] float32: -log p(x_0) in nats at the scored positions, from their hidden states [R, D]."""
    return reduce_scored(denoiser, rows, cross_entropy, batch)


def score(denoiser: Denoiser, inputs: Tensor, batch: Batch) -> Tensor:
    """Return [R] float32: -log p(x_0) in nats at the scored positions, after one network call on `inputs`."""
    return nll_of(denoiser, scored_rows(denoiser, denoiser.hidden(inputs, batch.visibility), batch.draw), batch)
