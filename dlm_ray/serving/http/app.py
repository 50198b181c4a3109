"""The HTTP API: OpenAI's paths and those for diffusion, over any backend that turns a task into events.

FastAPI parses the requests; `middleware` checks keys and body sizes and writes request ids and logs; the backend checks
lengths and generates. This module imports neither Ray nor a network.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from dlm_ray.config.server import Server
from dlm_ray.serving.errors import ApiError, ReplicaLost, no_model, raise_error
from dlm_ray.serving.http.middleware import Admission, Metrics, Middleware
from dlm_ray.serving.http.protocol import Chat, Completion, Infill, Score
from dlm_ray.serving.http.service import Backend, Service

log = logging.getLogger("dlm_ray.serving")
_PLAYGROUND_FILES = {
    "/": ("index.html", "text/html"),
    "/playground.js": ("playground.js", "text/javascript"),
    "/playground.css": ("playground.css", "text/css"),
}


def build(
    server: Server, backend: Backend, keys: list[str], capacity_texts: int, *, has_request_ids: bool = False
) -> Middleware:
    """Return the ASGI application.

    Args:
        server: the model names and limits.
        backend: the engines.
        keys: the valid API keys; empty for a service without keys.
        capacity_texts: maximum number of running and queued texts; requests beyond it are answered with 503.
        has_request_ids: as in `Middleware`.
    """
    app = FastAPI(title="dlm_ray", docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    metrics, admission = Metrics(), Admission(capacity_texts, server.limits.requests_per_key)
    service = Service(server, backend, admission, metrics)
    _add_errors(app)
    _add_completions(app, service)
    _add_infill(app, service)
    _add_score(app, service)
    _add_models(app, backend)
    _add_health(app, backend)
    _add_metrics(app, metrics, admission)
    if server.http.playground:
        _add_playground(app)
    paths = [route.path for route in app.routes if hasattr(route, "path")]
    return Middleware(
        app,
        keys=keys,
        body_bytes=server.limits.body_bytes,
        metrics=metrics,
        known_paths=paths,
        has_request_ids=has_request_ids,
    )


def _add_completions(app: FastAPI, service: Service) -> None:
    """Add OpenAI's paths for text completions and chats."""

    @app.post("/v1/completions")
    async def completions(body: Completion, request: Request) -> Response:
        task = await service.task(
            body,
            request,
            prompts=body.prompts(),
            suffix=body.suffix,
            lengths=body.max_tokens,
            length_field="max_tokens",
        )
        return await service.answer(body, task, request, is_chat=False)

    @app.post("/v1/chat/completions")
    async def chat(body: Chat, request: Request) -> Response:
        if body.max_tokens is not None and body.max_completion_tokens is not None:
            raise ApiError(
                400,
                "max_tokens and max_completion_tokens are the same; remove one of them",
                "invalid_value",
                "max_tokens",
            )
        field = "max_tokens" if body.max_tokens is not None else "max_completion_tokens"
        messages = [message.as_dict() for message in body.messages]
        task = await service.task(body, request, messages=messages, lengths=getattr(body, field), length_field=field)
        return await service.answer(body, task, request, is_chat=True)


def _add_infill(app: FastAPI, service: Service) -> None:
    """Add the path that generates the text between two texts."""

    @app.post("/v1/infill")
    async def infill(body: Infill, request: Request) -> Response:
        if isinstance(body.length_tokens, int):
            task = await service.infill_task(body, request, body.length_tokens)
            return await service.answer(body, task, request, is_chat=False)
        return await service.infill_best(body, request)


def _add_score(app: FastAPI, service: Service) -> None:
    """Add the path that scores a text."""

    @app.post("/v1/score")
    async def score(body: Score, request: Request) -> Response:
        await service.check_model(body.model)
        with service.admitted(request, 1):
            event = await service.backend.score(body.model, body.text, body.draws, body.seed)
        raise_error(event)
        return JSONResponse({"object": "score", "model": body.model, **event})


# FastAPI derives the schema of a response from the return type: `dict[str, Any]` is a JSON object without a schema.
def _add_models(app: FastAPI, backend: Backend) -> None:
    """Add OpenAI's paths that describe the models."""

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": await backend.describe()}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        cards = {card["id"]: card for card in await backend.describe()}
        if name not in cards:
            raise no_model(name, list(cards))
        return {**cards[name]}


def _add_health(app: FastAPI, backend: Backend) -> None:
    """Add the paths of the health checks: whether this process is alive, and whether a replica answers."""

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/readyz")
    async def readyz() -> Response:
        try:
            async with asyncio.timeout(5):
                await backend.describe()
        except (TimeoutError, ReplicaLost):
            raise ApiError(503, "no replica is ready yet", "not_ready", retry_after_seconds=1) from None
        return JSONResponse({"status": "ready"})


def _add_metrics(app: FastAPI, metrics: Metrics, admission: Admission) -> None:
    """Add the path that Prometheus reads."""

    @app.get("/metrics")
    async def metrics_page() -> Response:
        return PlainTextResponse(
            metrics.render({"texts_under_way": admission.num_texts, "texts_capacity": admission.capacity_texts})
        )


def _add_playground(app: FastAPI) -> None:
    """Add the files of the playground."""
    for path, (name, media_type) in _PLAYGROUND_FILES.items():
        app.add_api_route(path, _playground_file(name, media_type), include_in_schema=False)


def _playground_file(name: str, media_type: str) -> Callable[[], Awaitable[Response]]:
    content = resources.files("dlm_ray.serving.http.playground").joinpath(name).read_bytes()
    policy = (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )

    async def page() -> Response:
        return Response(
            content,
            media_type=media_type,
            headers={"content-security-policy": policy, "x-content-type-options": "nosniff"},
        )

    return page


def _add_errors(app: FastAPI) -> None:
    """Answer every error in the format of OpenAI's API."""

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        errors = error.errors()
        first = errors[0]
        location = [str(part) for part in first["loc"] if part != "body"]
        names = [part for part in location if part.isidentifier() and not part.startswith(("function", "constrained"))]
        param = names[0] if names else None
        reasons = [item["msg"] for item in errors if item["loc"][:2] == first["loc"][:2]]
        reason = " or: ".join(dict.fromkeys(reasons))  # one for each type that the field may have
        known = {"extra_forbidden": "is not supported by this service", "missing": "is missing"}
        reason = known.get(first["type"], reason)
        message = f"{'.'.join(location[:1]) or 'the body'}: {reason}".encode(errors="replace").decode()[:500]
        code = "unsupported_field" if first["type"] == "extra_forbidden" else "invalid_value"
        return await api_error(request, ApiError(400, message, code, param and param[:100]))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        return await api_error(request, ApiError(error.status_code, f"{error.detail}: see /openapi.json", code))

    @app.exception_handler(ReplicaLost)
    async def lost(request: Request, error: ReplicaLost) -> Response:
        return await api_error(
            request,
            ApiError(503, "the replica that processed this request has ended; try again", "replica_lost", None, 1),
        )

    @app.exception_handler(Exception)
    async def internal(request: Request, error: Exception) -> Response:
        log.error("%s failed", getattr(request.state, "request_id", "?"), exc_info=error)
        return await api_error(request, ApiError(500, "internal error; see the log under the request id", "internal"))
