"""The middleware of all requests: request ids, API keys, body sizes, admission, metrics and the access log."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import secrets
import time
from collections import Counter, defaultdict
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dlm_ray.serving.errors import ApiError, overloaded

log = logging.getLogger("dlm_ray.serving")

# Paths that need no key: health checks and the playground, which asks for the key itself.
_OPEN_PATHS = ("/healthz", "/readyz", "/", "/playground.js", "/playground.css")
_BODY_SECONDS = 30.0


class Admission:
    """Limits on the number of concurrent texts, in total, and of concurrent requests for each key."""

    def __init__(self, capacity_texts: int, requests_per_key: int):
        self.capacity_texts, self.requests_per_key = capacity_texts, requests_per_key
        self.num_texts = 0
        self._by_key: Counter[str] = Counter()

    def enter(self, key: str, num_texts: int) -> None:
        """Admit a request.

        Raises:
            ApiError: 429 if the key has reached its limit, 503 if the service has reached its capacity.
        """
        if self._by_key[key] >= self.requests_per_key:
            raise ApiError(
                429,
                f"{self._by_key[key]} requests of this key are running, which is its limit; wait until one is finished",
                "too_many_requests",
                retry_after_seconds=1,
            )
        if self.num_texts + num_texts > self.capacity_texts:
            raise overloaded()
        self._by_key[key] += 1
        self.num_texts += num_texts

    def leave(self, key: str, num_texts: int) -> None:
        """Release a request that is answered or cancelled."""
        self.num_texts -= num_texts
        self._by_key[key] -= 1
        if not self._by_key[key]:
            del self._by_key[key]


class Metrics:
    """The counters of /metrics, in Prometheus' text format."""

    def __init__(self) -> None:
        self.responses: Counter[tuple[str, int]] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.totals: Counter[str] = Counter()

    def render(self, gauges: dict[str, float]) -> str:
        """Return the text of /metrics with the current values of gauges."""
        lines = ["# TYPE dlm_ray_http_requests_total counter"]
        lines += [
            f'dlm_ray_http_requests_total{{path="{path}",status="{status}"}} {n}'
            for (path, status), n in sorted(self.responses.items())
        ]
        lines += ["# TYPE dlm_ray_http_request_seconds_total counter"]
        lines += [
            f'dlm_ray_http_request_seconds_total{{path="{path}"}} {seconds:.6f}'
            for path, seconds in sorted(self.seconds.items())
        ]
        for kind, values in (("counter", self.totals), ("gauge", gauges)):
            for name, value in sorted(values.items()):
                lines += [f"# TYPE dlm_ray_{name} {kind}", f"dlm_ray_{name} {value}"]
        return "\n".join(lines) + "\n"


class Middleware:
    """An ASGI application that wraps another.

    Args:
        app: the wrapped application.
        keys: the valid bearer tokens; empty for a service without keys.
        body_bytes: the maximum size of a request's body.
        metrics: the counters, updated after every response.
        known_paths: paths that the metrics name; all others are counted as `other`.
        has_request_ids: whether a proxy has set `x-request-id` on requests already, and adds it to responses.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Sequence[str],
        body_bytes: int,
        metrics: Metrics,
        known_paths: Sequence[str],
        has_request_ids: bool = False,
    ):
        self.app, self.body_bytes, self.metrics, self.known_paths = app, body_bytes, metrics, set(known_paths)
        self.has_request_ids = has_request_ids
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check and answer one request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request_id = self._request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        started, status = time.monotonic(), 499

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if not self.has_request_ids:
                    message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            scope["state"]["key"] = self._key(scope)
            await self.app(scope, await self._whole_body(scope, receive), answer)
        except ApiError as error:
            await _refuse(error, answer)
        finally:
            path = scope["path"] if scope["path"] in self.known_paths else "other"
            seconds = time.monotonic() - started
            self.metrics.responses[path, status] += 1
            self.metrics.seconds[path] += seconds
            log.info("%s %s %s %d %.3fs", request_id, scope["method"], path, status, seconds)

    def _request_id(self, scope: Scope) -> str:
        value = next((header for name, header in scope["headers"] if name == b"x-request-id"), b"").decode("latin-1")
        return (
            value
            if self.has_request_ids and re.fullmatch(r"[\w-]{8,80}", value, re.ASCII)
            else f"req-{secrets.token_hex(12)}"
        )

    def _key(self, scope: Scope) -> str:
        """Return a name of the request's key, by its number. All keys are compared, each in constant time."""
        if not self._keys or scope["path"] in _OPEN_PATHS:
            return "anonymous"
        value = next((header for name, header in scope["headers"] if name == b"authorization"), b"")
        kind, _, token = value.partition(b" ")
        matches = [hmac.compare_digest(token.strip(), key) for key in self._keys]
        if kind.lower() != b"bearer" or not any(matches):
            problem = "wrong" if value else "missing"
            raise ApiError(401, f"the API key is {problem}: send it as `Authorization: Bearer KEY`", "invalid_api_key")
        return f"key-{matches.index(True)}"

    async def _whole_body(self, scope: Scope, receive: Receive) -> Receive:
        """Read the whole body, and return a `receive` that returns it once."""
        too_large = ApiError(413, f"the body is larger than {self.body_bytes} bytes", "body_too_large")
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if length.isdigit() and int(length[:20]) > self.body_bytes:
            raise too_large
        parts, size, more = [], 0, True
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        break
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self.body_bytes:
                        raise too_large
                    more = message.get("more_body", False)
        except TimeoutError as error:
            raise ApiError(408, f"the body was not complete after {_BODY_SECONDS:g} seconds", "body_timeout") from error
        is_replayed = False

        async def replay() -> Message:
            nonlocal is_replayed
            if is_replayed:
                return await receive()
            is_replayed = True
            return {"type": "http.request", "body": b"".join(parts), "more_body": False}

        return replay


async def _refuse(error: ApiError, send: Send) -> None:
    body = json.dumps(error.body).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        **error.headers,
    }
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
