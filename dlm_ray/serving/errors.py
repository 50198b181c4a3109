"""Errors of the API, in the format of OpenAI's API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NotRequired, TypedDict

from dlm_ray.serving.messages import ErrorFields, Event, Score

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ErrorDetail(TypedDict):
    """The error in the body of a response."""

    message: str
    type: str
    param: str | None
    code: str
    request_id: NotRequired[str]
    """Id of the request; only in an error that ends a stream, whose headers have been sent."""


class ErrorBody(TypedDict):
    """The body of an error response."""

    error: ErrorDetail


class ApiError(Exception):
    """An error response.

    Args:
        status: the HTTP status.
        message: the value, the allowed values and the fix, for the user.
        code: the kind of error, for programs.
        param: the invalid field.
        retry_after_seconds: seconds after which a retry may succeed; None if it cannot.
    """

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, retry_after_seconds: int | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after_seconds = retry_after_seconds

    @property
    def body(self) -> ErrorBody:
        """Return the JSON body of the response."""
        error_type = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": error_type, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Return the headers of the response, without the request id."""
        return {} if self.retry_after_seconds is None else {"retry-after": str(self.retry_after_seconds)}


class ReplicaLost(Exception):
    """The replica that processed a request has ended; another replica returns the same text for the same request."""


def deadline_passed(seconds: float) -> ApiError:
    """Return the error of a request that was not finished within its deadline."""
    return ApiError(
        408,
        f"the text was not finished within {seconds:g} seconds; ask for fewer tokens, or for more timeout_seconds",
        "deadline",
    )


def no_model(name: str, names: Sequence[str]) -> ApiError:
    """Return the error of a request for a model that the service does not have."""
    return ApiError(
        404,
        f"the model {name!r} does not exist; this service has {', '.join(map(repr, names))}",
        "model_not_found",
        "model",
    )


def overloaded() -> ApiError:
    """Return the error of a request beyond the slots and the queue."""
    return ApiError(503, "all slots are in use and the queue is full; try again", "overloaded", retry_after_seconds=1)


def error_fields(error: ApiError) -> ErrorFields:
    """Return an error as plain values, which can cross process boundaries."""
    return error.status, error.message, error.code, error.param, error.retry_after_seconds


def error_event(error: ApiError) -> Event:
    """Return the event that ends a request with an error."""
    return {"error": error_fields(error)}


def raise_error(event: Event | Score) -> None:
    """Raise the ApiError of an event or a score that has one."""
    if "error" in event:
        raise ApiError(*event["error"])
