"""Bodies of requests: the fields of OpenAI that apply to a diffusion model, and the options of sampling.

Any other field is answered 400. A field of OpenAI that the service does not support is accepted if its value has no
effect (a penalty of 0, one candidate).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    field_validator,
    model_validator,
)

from dlm_ray.config.imports import is_class_path
from dlm_ray.config.sampling import RULE_NAMES, ServedSampling

if TYPE_CHECKING:
    from dlm_ray.generation.sampling import SamplingOptions

MAX_STOPS = 4
OPTIONS = tuple(ServedSampling.model_fields)
"""Fields that are options of sampling."""


def _is_text(text: str) -> str:
    """Return the text; raise ValueError if it cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("a text is Unicode without lone surrogates") from error
    return text


Text = Annotated[str, AfterValidator(_is_text)]
Ids = Annotated[list[Annotated[StrictInt, Field(ge=0, lt=2**31)]], Field(min_length=1)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Neutral = Annotated[float, Field(ge=0, le=0)]


class StreamOptions(BaseModel):
    """Options of `stream: true`."""

    model_config = ConfigDict(extra="forbid")
    include_usage: StrictBool = False
    """Whether the last chunk has the token counts."""
    denoising: StrictBool = False
    """Whether chunks without text send the canvas while it is denoised, as `dlm_ray.canvas`."""


class GenerationRequest(ServedSampling):
    """The fields of every request for text: the options of sampling, and those that all paths share.

    An option that is left out, or null, has the value of the checkpoint's recipe.
    """

    model: Text
    """Name of a served model."""
    n: Annotated[StrictInt, Field(ge=1, le=128)] | None = None
    """Texts for each prompt; 1 by default."""
    seed: Annotated[StrictInt, Field(ge=0, lt=2**63)] | None = None
    """Seed: the same seed gives the same text. Default: drawn by the service, which returns it."""
    stop: Annotated[Text, Field(min_length=1, max_length=256)] | Annotated[
        list[Annotated[Text, Field(min_length=1, max_length=256)]], Field(max_length=MAX_STOPS)
    ] | None = None  # fmt: skip
    """Texts that end the generation; the result does not include them."""
    stream: StrictBool | None = None
    """Whether the text is sent as server-sent events while it is generated."""
    stream_options: StreamOptions | None = None
    """Options of `stream: true`."""
    frequency_penalty: Neutral | None = None
    """Accepted as 0 only."""
    presence_penalty: Neutral | None = None
    """Accepted as 0 only."""
    timeout_seconds: Annotated[Number, Field(gt=0)] | None = None
    """Seconds after which the request ends with an error; at most the deadline of the service."""

    @model_validator(mode="before")
    @classmethod
    def _drop_null_options(cls, body: object) -> object:
        """Treat a null option as left out."""
        if not isinstance(body, dict):
            return body
        return {name: value for name, value in body.items() if value is not None or name not in OPTIONS}

    @field_validator("steps", "block_tokens", mode="before")
    @classmethod
    def _whole_number(cls, value: object) -> object:
        """Refuse a number with a decimal point, and a number in a string."""
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise ValueError("must be a whole number")
        return value

    @field_validator("rule")
    @classmethod
    def _built_in_rule(cls, rule: str | None) -> str | None:
        """Refuse a rule that is not built in: a request must not import code."""
        if rule is not None and is_class_path(rule):
            raise ValueError(f"a custom rule cannot be set by a request; must be one of {', '.join(RULE_NAMES)}")
        if rule is not None and rule not in RULE_NAMES:
            raise ValueError(f"must be one of {', '.join(RULE_NAMES)}")
        return rule

    def options(self) -> SamplingOptions:
        """Return the options of sampling that the request sets."""
        options = {name: getattr(self, name) for name in OPTIONS if name in self.model_fields_set}
        return cast("SamplingOptions", options)

    def stops(self) -> list[str]:
        """Return the stop texts."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class Completion(GenerationRequest):
    """Body of POST /v1/completions."""

    prompt: Text | Annotated[list[Text], Field(min_length=1)] | Ids | Annotated[list[Ids], Field(min_length=1)] = ""
    """Texts, or ids of the checkpoint's tokenizer."""
    suffix: Text | None = None
    """Text after the generated text; for checkpoints that can infill."""
    max_tokens: Annotated[StrictInt, Field(ge=1, le=2**31)] | None = None
    """Tokens to generate; 16 by default, as OpenAI's."""
    best_of: Literal[1] | None = None
    """Accepted as 1 only."""
    echo: Literal[False] | None = None
    """Accepted as false only."""
    logprobs: None = None
    """Accepted as null only."""
    logit_bias: None = None
    """Accepted as null only."""

    def prompts(self) -> list[str] | list[list[int]]:
        """Return the prompts as a list."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class ContentPart(BaseModel):
    """One part of a message."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[ContentPart]

    def as_dict(self) -> dict[str, str]:
        """Return the message as the chat template takes it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content}


class Chat(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    """The chat so far."""
    max_tokens: Annotated[StrictInt, Field(ge=1, le=2**31)] | None = None
    """Older name of `max_completion_tokens`."""
    max_completion_tokens: Annotated[StrictInt, Field(ge=1, le=2**31)] | None = None
    """Tokens to generate. Default: as many as the context and the limits of the service allow."""
    logprobs: Literal[False] | None = None
    """Accepted as false only."""


class Infill(GenerationRequest):
    """Body of POST /v1/infill, which generates the text between two texts."""

    prefix: Text
    """Text before the generated text."""
    suffix: Text
    """Text after it."""
    length_tokens: Annotated[StrictInt, Field(ge=1, le=2**31)] | Annotated[
        list[Annotated[StrictInt, Field(ge=1, le=2**31)]], Field(min_length=1, max_length=8)
    ]  # fmt: skip
    """Tokens to generate; of several lengths the service returns the text with the lowest bits per byte."""


class Score(BaseModel):
    """Body of POST /v1/score, which returns the (bound on the) likelihood of a text."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)
    model: Text
    """Name of a served model."""
    text: Annotated[Text, Field(min_length=1)]
    """Text to score."""
    draws: Annotated[StrictInt, Field(ge=2, le=4096)] = 16
    """Draws of (t, mask); an autoregressive model needs none."""
    seed: Annotated[StrictInt, Field(ge=0, lt=2**63)] = 0
    """Seed of the draws."""
