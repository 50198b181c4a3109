"""Convert the engine's events to responses of OpenAI's API: one JSON object, or a stream of server-sent chunks."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

from dlm_ray.serving.errors import ApiError, ErrorBody, deadline_passed, raise_error
from dlm_ray.serving.messages import CanvasTokens, Event, FinishReason


class Usage(TypedDict):
    """The `usage` object of a response."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]
    network_calls: dict[str, int]


class ChatText(TypedDict, total=False):
    """The message of a chat's choice, or the part of it in a chunk."""

    role: str
    content: str
    refusal: None


class ChoiceBody(TypedDict, total=False):
    """A generated text in a response or a chunk: `text`, or for a chat `message` or `delta`."""

    index: int
    finish_reason: FinishReason | None
    logprobs: None
    text: str
    message: ChatText
    delta: ChatText


class Candidate(TypedDict):
    """An infilled text of one of several lengths, and the score of the whole text."""

    length_tokens: int
    text: str
    bits_per_byte: float | None
    ci95_draws: tuple[float, float] | None


class Extension(TypedDict, total=False):
    """The object `dlm_ray` of a response or a chunk, which OpenAI's API does not have."""

    seed: int
    canvas: CanvasTokens
    length_tokens: int
    """Length of the returned text, of several lengths."""
    candidates: list[Candidate]
    """The texts of all lengths."""


class Body(TypedDict, total=False):
    """A response, or a chunk of a stream."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChoiceBody]
    usage: Usage
    dlm_ray: Extension


@dataclass
class _Choice:
    text: str = ""
    finish_reason: FinishReason | None = None
    num_tokens: int = 0
    calls: Sequence[int] = (0, 0)
    cached_tokens: int = 0


@dataclass
class Answer:
    """The state of a response, collected from events."""

    request_id: str
    model: str
    is_chat: bool
    deadline_seconds: float
    choices: dict[int, _Choice] = field(default_factory=dict)
    prompt_tokens: int = 0
    seed: int = 0
    created: int = field(default_factory=lambda: int(time.time()))

    def take(self, event: Event) -> None:
        """Add one event.

        Raises:
            ApiError: if the event is an error, or a text has reached its deadline.
        """
        raise_error(event)
        if "prompt_tokens" in event:
            self.prompt_tokens, self.seed = event["prompt_tokens"], event["seed"]
            return
        choice = self.choices.setdefault(event["index"], _Choice())
        choice.text += event.get("text", "")
        choice.num_tokens = event["num_tokens"]
        if "finish_reason" in event:
            if event["finish_reason"] == "deadline":
                raise deadline_passed(self.deadline_seconds)
            choice.finish_reason, choice.calls = event["finish_reason"], event["calls"]
            choice.cached_tokens = event["cached_tokens"]

    @property
    def network_calls(self) -> dict[str, int]:
        """Return the number of network calls that included a text of this request, possibly with others."""
        return {
            name: sum(choice.calls[i] for choice in self.choices.values())
            for i, name in enumerate(("denoising", "cache"))
        }

    @property
    def cached_tokens(self) -> int:
        """Return the number of prompt tokens that were in the prefix cache."""
        return sum(choice.cached_tokens for choice in self.choices.values())

    def usage(self) -> Usage:
        """Return the `usage` object: numbers of tokens and network calls."""
        num_completion_tokens = sum(choice.num_tokens for choice in self.choices.values())
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": num_completion_tokens,
            "total_tokens": self.prompt_tokens + num_completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "network_calls": self.network_calls,
        }

    def body(self) -> Body:
        """Return the body of a response that is not streamed."""
        choices = [self._choice(index, choice) for index, choice in sorted(self.choices.items())]
        object_type = "chat.completion" if self.is_chat else "text_completion"
        return {**self._head(object_type), "choices": choices, "usage": self.usage(), "dlm_ray": {"seed": self.seed}}

    def chunk(self, event: Event) -> Body | None:
        """Return the chunk of an event that `take` has added; None if the event adds nothing to the stream."""
        if "prompt_tokens" in event:
            return None
        text, reason = event.get("text", ""), event.get("finish_reason")
        choice: ChoiceBody = {"index": event["index"], "finish_reason": reason, "logprobs": None}
        if self.is_chat:
            choice["delta"] = {"content": text} if text else {}
        else:
            choice["text"] = text
        chunk: Body = {
            **self._head("chat.completion.chunk" if self.is_chat else "text_completion"),
            "choices": [choice],
        }
        if "canvas" in event:
            chunk["dlm_ray"] = {"canvas": event["canvas"]}
        return chunk

    def first_chunk(self) -> Body:
        """Return the first chunk of a chat, with the role."""
        choice: ChoiceBody = {
            "index": 0,
            "finish_reason": None,
            "logprobs": None,
            "delta": {"role": "assistant", "content": ""},
        }
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def usage_chunk(self) -> Body:
        """Return the last chunk, with the usage."""
        object_type = "chat.completion.chunk" if self.is_chat else "text_completion"
        return {**self._head(object_type), "choices": [], "usage": self.usage(), "dlm_ray": {"seed": self.seed}}

    def _head(self, object_type: str) -> Body:
        prefix = "chatcmpl" if self.is_chat else "cmpl"
        return {
            "id": f"{prefix}-{self.request_id}",
            "object": object_type,
            "created": self.created,
            "model": self.model,
        }

    def _choice(self, index: int, choice: _Choice) -> ChoiceBody:
        common: ChoiceBody = {"index": index, "finish_reason": choice.finish_reason, "logprobs": None}
        if self.is_chat:
            return {**common, "message": {"role": "assistant", "content": choice.text, "refusal": None}}
        return {**common, "text": choice.text}


def encode_event(data: Body | ErrorBody) -> bytes:
    """Return the bytes of one server-sent event."""
    return f"data: {json.dumps(data)}\n\n".encode()


async def stream(answer: Answer, events: AsyncIterator[list[Event]], include_usage: bool) -> AsyncGenerator[bytes]:
    """Yield server-sent chunks up to `[DONE]`; after an error, its event ends the stream."""
    try:
        if answer.is_chat:
            yield encode_event(answer.first_chunk())
        async for batch in events:
            chunks = b""
            for event in batch:
                answer.take(event)
                chunk = answer.chunk(event)
                chunks += encode_event(chunk) if chunk is not None else b""
            if chunks:
                yield chunks
        if include_usage:
            yield encode_event(answer.usage_chunk())
        yield b"data: [DONE]\n\n"
    except ApiError as error:
        body = error.body
        body["error"]["request_id"] = answer.request_id
        yield encode_event(body)
