"""What a request may say: OpenAI's fields that mean something to a diffusion model, and those that it adds. Anything else is a 400.

Of the fields that OpenAI has and this service has not, a value that asks for nothing (a penalty of 0, one candidate) is taken.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, StrictInt

MAX_STOPS = 4


def _is_text(text: str) -> str:
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
    """Of `stream: true`."""

    model_config = ConfigDict(extra="forbid")
    include_usage: StrictBool = False
    denoising: StrictBool = False
    """Also the canvas while it is denoised, as `dlm_ray.canvas` of chunks without text."""


class GenerationRequest(BaseModel):
    """What every request for text has."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)
    model: Text
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    """0 takes the most probable token; as the checkpoint's recipe says, if absent."""
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    n: Annotated[StrictInt, Field(ge=1, le=128)] | None = None
    seed: Annotated[StrictInt, Field(ge=0, lt=2**63)] | None = None
    """The same seed gives the same text; drawn, and said in the answer, if absent."""
    stop: Annotated[Text, Field(min_length=1, max_length=256)] | Annotated[
        list[Annotated[Text, Field(min_length=1, max_length=256)]], Field(max_length=MAX_STOPS)
    ] | None = None  # fmt: skip
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: Neutral | None = None
    presence_penalty: Neutral | None = None
    rule: Literal[
        "confidence", "margin", "ancestral", "first_hitting", "threshold", "factor", "entropy_bounded", "left_to_right", "tweedie",
        "state_dependent",
    ] | None = None  # fmt: skip
    """What a denoising step reveals."""
    steps: Annotated[StrictInt, Field(ge=1, le=2**20)] | None = None
    """Denoising steps, of a block where there are blocks."""
    grid: Literal["uniform", "cosine"] | None = None
    block_tokens: Annotated[StrictInt, Field(ge=1, le=2**20)] | None = None
    """One of the sizes that /v1/models lists."""
    threshold: Annotated[Number, Field(ge=0, le=1)] | None = None
    factor: Annotated[Number, Field(gt=0)] | None = None
    entropy_bound: Annotated[Number, Field(ge=0)] | None = None
    remask: Annotated[Number, Field(ge=0, le=1)] | None = None
    timeout_seconds: Annotated[Number, Field(gt=0)] | None = None
    """After which the request ends with an error; at most the service's own."""

    def options(self) -> dict[str, Any]:
        """`SamplingOptions` that were named."""
        names = (
            "temperature",
            "top_p",
            "rule",
            "steps",
            "grid",
            "block_tokens",
            "threshold",
            "factor",
            "entropy_bound",
            "remask",
        )
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def stops(self) -> list[str]:
        """Stop texts."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class Completion(GenerationRequest):
    """POST /v1/completions."""

    prompt: Text | Annotated[list[Text], Field(min_length=1)] | Ids | Annotated[list[Ids], Field(min_length=1)] = ""
    """Texts, or ids of the checkpoint's tokenizer."""
    suffix: Text | None = None
    """What stands behind the text; for checkpoints that can infill."""
    max_tokens: Annotated[StrictInt, Field(ge=1, le=2**31)] | None = None
    """16, as OpenAI has it."""
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: None = None
    logit_bias: None = None

    def prompts(self) -> list[str] | list[list[int]]:
        """One or several."""
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


class ContentPart(BaseModel):
    """Of a message in parts."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """One turn."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[ContentPart]

    def as_dict(self) -> dict[str, str]:
        """For the chat template."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content}


class Chat(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[StrictInt, Field(ge=1, le=2**31)] | None = None
    max_completion_tokens: Annotated[StrictInt, Field(ge=1, le=2**31)] | None = None
    """As much as there is room for, if neither is said."""
    logprobs: Literal[False] | None = None


class Infill(GenerationRequest):
    """POST /v1/infill: what stands between two texts."""

    prefix: Text
    suffix: Text
    length_tokens: Annotated[StrictInt, Field(ge=1, le=2**31)] | Annotated[
        list[Annotated[StrictInt, Field(ge=1, le=2**31)]], Field(min_length=1, max_length=8)
    ]  # fmt: skip
    """Tokens to write; of several lengths the one whose whole text has the least bound in bits per byte."""


class Score(BaseModel):
    """POST /v1/score: how probable a text is."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)
    model: Text
    text: Annotated[Text, Field(min_length=1)]
    draws: Annotated[StrictInt, Field(ge=2, le=4096)] = 16
    """Of (t, mask); an autoregressive model needs none."""
    seed: Annotated[StrictInt, Field(ge=0, lt=2**63)] = 0
