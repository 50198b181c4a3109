"""From the engine's events to OpenAI's answers: whole, or as server-sent chunks."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from dlm_ray.serving.errors import ApiError, Event, deadline_passed, raise_error


@dataclass
class _Choice:
    text: str = ""
    finish_reason: str | None = None
    num_tokens: int = 0
    calls: tuple[int, int] = (0, 0)
    cached_tokens: int = 0


@dataclass
class Answer:
    """What is known of a request's texts so far."""

    request_id: str
    model: str
    is_chat: bool
    deadline_seconds: float
    choices: dict[int, _Choice] = field(default_factory=dict)
    prompt_tokens: int = 0
    seed: int = 0
    created: int = field(default_factory=lambda: int(time.time()))

    def take(self, event: Event) -> None:
        """One event.

        Raises:
            ApiError: if it is one, or a deadline has passed.
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
            choice.finish_reason, choice.calls = event["finish_reason"], tuple(event["calls"])
            choice.cached_tokens = event["cached_tokens"]

    @property
    def network_calls(self) -> dict[str, int]:
        """Calls of the network in which a text of this request was; others' texts were in them, too."""
        return {
            name: sum(choice.calls[i] for choice in self.choices.values())
            for i, name in enumerate(("denoising", "cache"))
        }

    @property
    def cached_tokens(self) -> int:
        """Of the prompts, found in the prefix cache."""
        return sum(choice.cached_tokens for choice in self.choices.values())

    def usage(self) -> dict[str, Any]:
        """Tokens and network calls."""
        written = sum(choice.num_tokens for choice in self.choices.values())
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": written,
            "total_tokens": self.prompt_tokens + written,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "network_calls": self.network_calls,
        }

    def whole(self) -> dict[str, Any]:
        """The answer that is no stream."""
        choices = [self._choice(index, choice) for index, choice in sorted(self.choices.items())]
        kind = "chat.completion" if self.is_chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": self.usage(), "dlm_ray": {"seed": self.seed}}

    def chunk(self, event: Event) -> dict[str, Any] | None:
        """What an event adds to a stream, after `take`; None if nothing."""
        if "prompt_tokens" in event:
            return None
        text, reason = event.get("text", ""), event.get("finish_reason")
        choice: dict[str, Any] = {"index": event["index"], "finish_reason": reason, "logprobs": None}
        if self.is_chat:
            choice["delta"] = {"content": text} if text else {}
        else:
            choice["text"] = text
        chunk = {**self._head("chat.completion.chunk" if self.is_chat else "text_completion"), "choices": [choice]}
        if "canvas" in event:
            chunk["dlm_ray"] = {"canvas": event["canvas"]}
        return chunk

    def beginning(self) -> dict[str, Any]:
        """The first chunk of a chat."""
        choice = {"index": 0, "finish_reason": None, "logprobs": None, "delta": {"role": "assistant", "content": ""}}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def ending(self) -> dict[str, Any]:
        """The last chunk, with the usage."""
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return {**self._head(kind), "choices": [], "usage": self.usage(), "dlm_ray": {"seed": self.seed}}

    def _head(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.is_chat else "cmpl"
        return {"id": f"{prefix}-{self.request_id}", "object": kind, "created": self.created, "model": self.model}

    def _choice(self, index: int, choice: _Choice) -> dict[str, Any]:
        own: dict[str, Any] = {"index": index, "finish_reason": choice.finish_reason, "logprobs": None}
        if self.is_chat:
            return {**own, "message": {"role": "assistant", "content": choice.text, "refusal": None}}
        return {**own, "text": choice.text}


def said(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return f"data: {json.dumps(data)}\n\n".encode()


async def stream(answer: Answer, events: AsyncIterator[list[Event]], include_usage: bool) -> AsyncGenerator[bytes]:
    """Server-sent chunks up to `[DONE]`; after an error that comes when some are sent already, one event with it and no `[DONE]`."""
    try:
        if answer.is_chat:
            yield said(answer.beginning())
        async for some in events:
            chunks = b""
            for event in some:
                answer.take(event)
                chunk = answer.chunk(event)
                chunks += said(chunk) if chunk is not None else b""
            if chunks:
                yield chunks
        if include_usage:
            yield said(answer.ending())
        yield b"data: [DONE]\n\n"
    except ApiError as error:
        body = error.body
        body["error"]["request_id"] = answer.request_id
        yield said(body)
