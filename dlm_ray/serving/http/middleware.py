"""What every request passes first: its id, its key, the size of its body; and what is counted and logged when it is answered."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import secrets
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from dlm_ray.serving.errors import ApiError, overloaded

log = logging.getLogger("dlm_ray.serving")
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

# What says nothing of anybody's texts: whether the service lives, and the page that asks for a key.
_OPEN_PATHS = ("/healthz", "/readyz", "/", "/playground.js", "/playground.css")
_BODY_SECONDS = 30.0


class Admission:
    """How many texts are under way, in all and for each key."""

    def __init__(self, capacity_texts: int, requests_per_key: int):
        self.capacity_texts, self.requests_per_key = capacity_texts, requests_per_key
        self.num_texts = 0
        self._by_key: Counter[str] = Counter()

    def enter(self, key: str, num_texts: int) -> None:
        """Lets a request in.

        Raises:
            ApiError: 429 if the key has enough under way, 503 if everybody together has.
        """
        if self._by_key[key] >= self.requests_per_key:
            raise ApiError(
                429,
                f"{self._by_key[key]} requests of this key are under way; wait for one of them",
                "too_many_requests",
                retry_after_seconds=1,
            )
        if self.num_texts + num_texts > self.capacity_texts:
            raise overloaded()
        self._by_key[key] += 1
        self.num_texts += num_texts

    def leave(self, key: str, num_texts: int) -> None:
        """It is answered, or nobody waits any more."""
        self.num_texts -= num_texts
        self._by_key[key] -= 1
        if not self._by_key[key]:
            del self._by_key[key]


class Metrics:
    """What /metrics says, in Prometheus' text form."""

    def __init__(self) -> None:
        self.responses: Counter[tuple[str, int]] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.totals: Counter[str] = Counter()

    def render(self, gauges: dict[str, float]) -> str:
        """The page."""
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
    """An ASGI application around another.

    Args:
        app: what answers requests that pass.
        keys: one of them has to be brought as a bearer token; none for a service without keys.
        body_bytes: of a request.
        counts: is told of every answer.
        known_paths: that are counted by name.
        is_named: a proxy in front has named the request already, in `x-request-id`, and will name the answer.
    """

    def __init__(
        self,
        app: Any,
        *,
        keys: Sequence[str],
        body_bytes: int,
        counts: Metrics,
        known_paths: Sequence[str],
        is_named: bool = False,
    ):
        self.app, self.body_bytes, self.counts, self.known_paths = app, body_bytes, counts, set(known_paths)
        self.is_named = is_named
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request_id = self._request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        started, status = time.monotonic(), 499

        async def answer(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if not self.is_named:
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
            self.counts.responses[path, status] += 1
            self.counts.seconds[path] += seconds
            log.info("%s %s %s %d %.3fs", request_id, scope["method"], path, status, seconds)

    def _request_id(self, scope: Scope) -> str:
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"").decode("latin-1")
        return (
            given if self.is_named and re.fullmatch(r"[\w-]{8,80}", given, re.ASCII) else f"req-{secrets.token_hex(12)}"
        )

    def _key(self, scope: Scope) -> str:
        """A name for the key, which is not the key: its number. All keys are compared, each in constant time."""
        if not self._keys or scope["path"] in _OPEN_PATHS:
            return "anybody"
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        kind, _, token = given.partition(b" ")
        matches = [hmac.compare_digest(token.strip(), key) for key in self._keys]
        if kind.lower() != b"bearer" or not any(matches):
            what = "wrong" if given else "missing"
            raise ApiError(401, f"the API key is {what}: send it as `Authorization: Bearer KEY`", "invalid_api_key")
        return f"key-{matches.index(True)}"

    async def _whole_body(self, scope: Scope, receive: Receive) -> Receive:
        """The body, read before anything else happens, as a `receive` that gives it once."""
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
            raise ApiError(408, f"the body was not there after {_BODY_SECONDS:g} seconds", "body_timeout") from error
        given = False

        async def replay() -> MutableMapping[str, Any]:
            nonlocal given
            if given:
                return await receive()
            given = True
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
