"""The entries of a checkpoint's manifest, which training writes and checkpoint, generation and evaluation read."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias, TypedDict, TypeVar

from pydantic import GetPydanticSchema

JsonObject: TypeAlias = dict[str, Any]
"""A JSON object whose keys belong to another package, such as a Hugging Face configuration; nested values are read by
key."""

Entry = TypeVar("Entry")
Stored: TypeAlias = Annotated[Entry, GetPydanticSchema(lambda _, handler: handler(dict[str, object]))]
"""A field that is a TypedDict for the type checker. Validation accepts any JSON object, because the sha256 of the
manifest already guards its content."""


class TokenizerFields(TypedDict):
    """The fields of a `data.identity.TokenizerIdentity`."""

    name: str
    sha256: str
    vocab_size: int
    start_id: int
    end_id: int


class ModelFields(TypedDict):
    """The network of a run, and the name of its objective."""

    config: JsonObject
    """The Hugging Face configuration, the mask token's embedding row included."""
    mask_id: int | None
    shift: bool
    is_causal: bool
    objective: str
    """`objective.name` of the recipe."""


class Capabilities(TypedDict):
    """What a checkpoint can do, and the limits of its sequences."""

    likelihood: str
    """exact, bound or none."""
    infill: bool
    canvas: str
    """whole, blocks or simplex_blocks."""
    block_tokens: int
    """K: the tokens that are denoised together."""
    rules: list[str]
    """The sampling rules that apply to the objective."""
    sequence_length: int
    document_mask: bool
    """Whether the documents of a sequence do not see each other."""


class CursorFields(TypedDict):
    """The fields of a `data.order.Cursor`."""

    num_sequences: int
    counts: list[int]


class FaultFields(TypedDict, total=False):
    """The fields of `training.faults.Faults`."""

    skipped_steps: int
    skipped_in_a_row: int
    skipped_sequences: dict[str, int]


class Validation(TypedDict, total=False):
    """Measurements of the held-out sequences."""

    nats_per_token: float
    bits_per_byte: float
    nll_by_t: list[float]
    """The unweighted cross-entropy by equal bins of t, of an objective with a bound."""
    block_nll: float
    """The mean cross-entropy of the tokens of a block, of an objective without a likelihood."""
    block_nll_by_t: list[float]


class RunMetrics(TypedDict, total=False):
    """The last metrics of a run. The losses that an objective names appear under their own names, too."""

    step: int
    checkpoint: str | None
    """The last committed directory."""
    loss: float
    gradient_norm: float
    learning_rate: float
    annealing_ratio: float
    block_tokens: int
    tokens_per_second: float
    validation: Validation
    validated_step: int


class RunFields(TypedDict, total=False):
    """The state of a run that is neither a tensor nor the cursor: `extra` of the manifest."""

    metrics: RunMetrics
    faults: FaultFields
    data: list[str]
    """For each source, one hash of its training shards."""
    clip: tuple[float, float] | None
    """[beta, omega] of the last clip search."""
    copied_from: str
    """The checkpoint that this one is a copy of."""


class ManifestFields(TypedDict):
    """The fields that a run writes into a manifest; a commit adds the arrays, the files and the sha256."""

    step: int
    recipe: JsonObject
    tokenizer: TokenizerFields
    model: ModelFields
    capabilities: Capabilities
    cursor: CursorFields
    extra: RunFields
