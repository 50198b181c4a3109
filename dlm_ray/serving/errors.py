"""What is answered when something is wrong, in the form that OpenAI's clients read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Event = dict[str, Any]
"""Of a text, as `host.Host.generate` gives it: plain values."""

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that is no success.

    Args:
        status: of HTTP.
        message: for a person: the value, what is allowed, what to change.
        code: for a program.
        param: the field that is wrong.
        retry_after_seconds: when it is worth trying again.
    """

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, retry_after_seconds: int | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_after_seconds = (
            status,
            message,
            code,
            param,
            retry_after_seconds,
        )

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Beside the request id."""
        return {} if self.retry_after_seconds is None else {"retry-after": str(self.retry_after_seconds)}


class ReplicaLost(Exception):
    """The process that worked on a request is gone; the same request to another one gives the same text."""


def deadline_passed(seconds: float) -> ApiError:
    """Whoever waits has waited long enough."""
    return ApiError(
        408,
        f"the text was not finished within {seconds:g} seconds; ask for fewer tokens, or for more timeout_seconds",
        "deadline",
    )


def no_model(name: str, names: Sequence[str]) -> ApiError:
    """The service does not have it."""
    return ApiError(
        404, f"there is no model {name!r}; this service has {', '.join(map(repr, names))}", "model_not_found", "model"
    )


def overloaded() -> ApiError:
    """Every slot is taken and enough texts wait already."""
    return ApiError(
        503, "all slots are taken and enough texts wait already; try again", "overloaded", retry_after_seconds=1
    )


def error_event(error: ApiError) -> Event:
    """As it crosses a border between processes."""
    return {"error": [error.status, error.message, error.code, error.param, error.retry_after_seconds]}


def raise_error(event: Event) -> None:
    """Raises the ApiError that an event brings, if it does."""
    if "error" in event:
        raise ApiError(*event["error"])
