"""Scores of held-out text by document, so that two models are compared in pairs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import numpy.typing as npt

from dlm_ray.config.errors import UserError
from dlm_ray.data.index import load_index
from dlm_ray.data.reading import check_ids, read_split
from dlm_ray.diffusion import likelihood
from dlm_ray.diffusion.draws import maskable_positions
from dlm_ray.diffusion.visibility import Visibility, documents_apart

if TYPE_CHECKING:
    from dlm_ray.generation.text_model import TextModel

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


class ScoreReport(TypedDict):
    """The bits per byte of a data split, for the user."""

    bits_per_byte: float
    """Bits per byte of all documents together."""
    is_bound: bool
    """Whether they are an upper bound."""
    ci95_documents: tuple[float, float] | None
    """95 % bootstrap interval over documents; None if there is one document."""
    ci95_draws: tuple[float, float] | None
    """95 % interval over draws, for these documents; None if there is one draw."""
    documents: int
    tokens: int
    bytes: int
    draws_per_sequence: int


class ScoreDifference(TypedDict):
    """The difference of bits per byte between two models on the same documents."""

    bits_per_byte: float
    ci95_documents_paired: tuple[float, float] | None
    """95 % paired bootstrap interval over documents; None if there is one document."""


@dataclass(frozen=True)
class Scored:
    """Nats and bytes of each document."""

    nats: Floats
    """[documents] negative log-likelihood of each document in nats, or its upper bound."""
    num_bytes: Floats
    """[documents] raw UTF-8 bytes of the scored text."""
    draw_totals: Floats
    """[draws] nats of all documents, by each draw separately."""
    num_tokens: int
    """Scored tokens of all documents."""
    is_bound: bool
    """Whether the nats are an upper bound."""

    @property
    def bits_per_byte(self) -> float:
        """Return the bits per byte of all documents together."""
        return likelihood.bits_per_byte(float(self.nats.sum()), float(self.num_bytes.sum()))

    def as_dict(self) -> ScoreReport:
        """Return the bits per byte, their intervals and the counts."""
        return {
            "bits_per_byte": self.bits_per_byte,
            "is_bound": self.is_bound,
            "ci95_documents": likelihood.documents_interval(self.nats, self.num_bytes),
            "ci95_draws": likelihood.draws_interval(self.draw_totals, float(self.num_bytes.sum())),
            "documents": len(self.nats),
            "tokens": self.num_tokens,
            "bytes": int(self.num_bytes.sum()),
            "draws_per_sequence": len(self.draw_totals),
        }

    def minus(self, other: Scored) -> ScoreDifference:
        """Return the difference of bits per byte to another model on the same documents."""
        assert (self.num_bytes == other.num_bytes).all(), "a paired comparison needs the same documents"
        difference = self.nats - other.nats
        return {
            "bits_per_byte": likelihood.bits_per_byte(float(difference.sum()), float(self.num_bytes.sum())),
            "ci95_documents_paired": likelihood.documents_interval(difference, self.num_bytes),
        }


def score_data(
    model: TextModel,
    data: str,
    *,
    split: str,
    max_sequences: int | None,
    draws_per_sequence: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Scored:
    """Return the nats and bytes of each document of a split of a data folder.

    Warns if sequences are padded because they are not whole blocks of the checkpoint, or are longer than those in
    training.

    Raises:
        UserError: if the data has another tokenizer, its sequences are longer than the network has positions, the split
            is empty, the objective bounds no likelihood, or no sequence or draw is to be scored.
    """
    _check_request(model, draws_per_sequence, max_sequences)
    index = load_index(data)
    if difference := index.tokenizer.differs_from(model.tokenizer_identity):
        raise UserError(
            f"{data} was made with {difference} as the checkpoint; build the data with the checkpoint's tokenizer"
        )
    _check_sequences(model, data, index.sequence_length)
    sequences = read_split(data, split, max_sequences)
    if not sequences:
        raise UserError.of(
            "split",
            split,
            f"this split of {data} has no sequences",
            "build it with a larger `held_out`, or name another split",
        )
    check_ids(sequences, model.denoiser.mask_id, model.denoiser.vocab_size)
    x_0 = np.stack([sequence.input_ids for sequence in sequences]).astype(np.int64)
    document_ids = np.stack([sequence.document_ids for sequence in sequences])
    scored = likelihood.token_nats(
        model.denoiser,
        model.objective,
        x_0,
        document_ids,
        lambda ids: Visibility(model.pattern, document_ids=documents_apart(ids, model.document_mask, model.device)),
        model.device,
        num_draws=draws_per_sequence,
        seed=seed,
        progress=progress,
    )
    documents = number_documents([sequence.chunk for sequence in sequences], document_ids)
    num_bytes = np.stack([sequence.num_bytes for sequence in sequences]).astype(np.float64)
    return Scored(
        likelihood.by_document(scored.nats, documents),
        likelihood.by_document(num_bytes, documents),
        scored.draw_totals,
        int(maskable_positions(document_ids).sum()),
        model.objective.likelihood == "bound",
    )


def _check_request(model: TextModel, draws_per_sequence: int, max_sequences: int | None) -> None:
    """Raise UserError if a number is below 1, or the objective bounds no likelihood."""
    for name, value in {"draws_per_sequence": draws_per_sequence, "max_sequences": max_sequences}.items():
        if value is not None and value < 1:
            raise UserError.of(name, value, "must be at least 1")
    if model.objective.likelihood == "none":
        raise UserError(
            "this checkpoint's objective (ssd_lm) gives no bound of the likelihood: it has no bits per byte"
        )


def _check_sequences(model: TextModel, data: str, sequence_length: int) -> None:
    """Warn if the sequences of `data` differ from those in training; raise UserError if they cannot be scored."""
    padding = likelihood.num_padding(model.objective, sequence_length)
    positions = model.denoiser.network.config.max_position_embeddings
    if sequence_length + padding > positions:
        raise UserError(
            f"{data} has sequences of {sequence_length} tokens, scored in {sequence_length + padding} positions, and "
            f"the network has {positions}; build the data with a smaller `sequence_length`"
        )
    if padding:
        warnings.warn(
            f"{data} has sequences of {sequence_length} tokens, which are not a whole number of this checkpoint's "
            f"blocks of {likelihood.block_tokens_of(model.objective)}: each is scored with {padding} tokens of padding "
            "after it, which no other token sees",
            stacklevel=4,
        )
    if sequence_length > model.sequence_length:
        warnings.warn(
            f"{data} has sequences of {sequence_length} tokens, and the checkpoint was trained on sequences of "
            f"{model.sequence_length}: it never saw the positions after them",
            stacklevel=4,
        )


def number_documents(parts: Sequence[int], document_ids: Integers) -> Integers:
    """Return the number of each token's document over all sequences, -1 for padding.

    Args:
        parts: [N] data part of each sequence; documents are numbered within a part.
        document_ids: [N, L] documents of the tokens.
    """
    numbers: dict[tuple[int, int], int] = {}
    numbered = np.full(document_ids.shape, -1)
    for index, (part, ids) in enumerate(zip(parts, document_ids, strict=True)):
        for document in np.unique(ids[ids >= 0]):
            numbered[index, ids == document] = numbers.setdefault((part, int(document)), len(numbers))
    return numbered
