"""The values that the HTTP server, the replicas and the engines exchange: plain values, which can cross processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NotRequired, TypedDict

if TYPE_CHECKING:
    from dlm_ray.generation.sampling import SamplingOptions

FinishReason = Literal["length", "stop", "deadline", "cancelled"]
ErrorFields = tuple[int, str, str, str | None, int | None]
"""Arguments of an `ApiError`."""


class Task(TypedDict):
    """A request for text."""

    request_id: str
    """Id in the log and in the response."""
    model: str
    """Name of the served model."""
    prompts: list[str] | list[list[int]]
    """Texts, or lists of ids."""
    messages: list[dict[str, str]] | None
    """Messages of a chat, which replace `prompts`."""
    suffix: str | None
    """Text after the generated text."""
    lengths: list[int]
    """Tokens to generate: one text per prompt and length; empty for the default length."""
    length_field: str
    """Field of the request that holds the length."""
    n: int
    """Texts per prompt and length."""
    seed: int | None
    """Seed; None to draw one."""
    stops: list[str]
    """Stop texts."""
    options: SamplingOptions
    """Options that the request sets."""
    is_streamed: bool
    """Whether the client reads the text while it is generated."""
    stream_canvas: bool
    """Whether the client reads the canvas while it is denoised."""
    timeout_seconds: float | None
    """Timeout of the request; None for the deadline of the service."""


class CanvasTokens(TypedDict):
    """The canvas of a text while it is denoised."""

    start: int
    """Number of final tokens before the canvas."""
    tokens: list[list[str | float | None]]
    """For each position its text (None while masked) and its probability."""


class Event(TypedDict, total=False):
    """An event of a request for text.

    The first event has `prompt_tokens` and `seed`. Each later one has the progress of one text, or an `error`, which
    ends the request.
    """

    prompt_tokens: int
    """Tokens of all prompts and suffixes."""
    seed: int
    """Seed of the request."""
    index: int
    """Index of the text in the request."""
    num_tokens: int
    """Tokens of the text so far."""
    text: str
    """Characters that became final."""
    canvas: CanvasTokens
    """The canvas, if the client reads it."""
    finish_reason: FinishReason
    """Why the text ended; only in its last event, as the two fields below."""
    calls: list[int]
    """Network calls of the text: those that denoised it, and those that only filled its KV cache."""
    cached_tokens: int
    """Tokens of the prompt that were in the prefix cache."""
    error: ErrorFields
    """The error that ends the request."""


class Score(TypedDict, total=False):
    """The score of a text, or the `error` of the request for it."""

    nats: float
    """Negative log-likelihood of the text, or an upper bound of it."""
    bits_per_byte: float | None
    """The same in bits per byte of UTF-8; None for a text that cannot be scored."""
    is_bound: bool
    """Whether the score is an upper bound."""
    ci95_draws: tuple[float, float] | None
    """95 % interval of the bits per byte over draws; None if there is one draw."""
    draws: int
    """Number of draws."""
    tokens: int
    """Scored tokens."""
    bytes: int
    """Bytes of the text."""
    error: ErrorFields
    """The error that ends the request."""


class Load(TypedDict):
    """The load of an engine."""

    active: int
    """Slots in use."""
    waiting: int
    """Texts in the queue."""


class ModelCard(TypedDict):
    """The entry of a model in /v1/models."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    checkpoint: dict[str, str | None]
    """`name`, the last two parts of its path, and `weights`."""
    kind: str
    """`SamplingTarget.kind`."""
    capabilities: dict[str, bool | str]
    rules: list[str]
    """Sampling rules, the default first."""
    block_tokens: list[int]
    """Block sizes that requests may choose."""
    whole_canvas: bool
    """Whether whole texts are sampled at once."""
    context_tokens: int
    limits: dict[str, int | float]
    """The largest values of the fields of a request."""
    defaults: dict[str, float]
    """Options of sampling that requests leave out."""
    load: NotRequired[Load]
    """Load of the replica that answered."""
