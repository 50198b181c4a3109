"""The HTTP interface: OpenAI's paths and those that diffusion adds, over anything that turns a task into events. Knows neither Ray nor the network.

The parsing is FastAPI's; keys, body sizes, ids of requests and logs are the gate's; what a text costs and how it is written the engine's.
"""

from __future__ import annotations

import asyncio
import logging
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
_PAGE = {
    "/": ("index.html", "text/html"),
    "/playground.js": ("playground.js", "text/javascript"),
    "/playground.css": ("playground.css", "text/css"),
}


def build(server: Server, backend: Backend, keys: list[str], capacity_texts: int, *, is_named: bool = False) -> Any:
    """The ASGI application.

    Args:
        server: names, limits.
        backend: writes.
        keys: one of them is needed; none for a service that is open.
        capacity_texts: under way at once, waiting ones included; more are answered 503.
        is_named: as of `Gate`.
    """
    app = FastAPI(title="dlm_ray", docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    counts, admission = Metrics(), Admission(capacity_texts, server.limits.requests_per_key)
    service = Service(server, backend, admission, counts)
    _add_errors(app)

    @app.post("/v1/completions")
    async def completions(asked: Completion, request: Request) -> Response:
        task = await service.task(
            asked,
            request,
            prompts=asked.prompts(),
            suffix=asked.suffix,
            lengths=asked.max_tokens,
            length_field="max_tokens",
        )
        return await service.answer(asked, task, request, is_chat=False)

    @app.post("/v1/chat/completions")
    async def chat(asked: Chat, request: Request) -> Response:
        if asked.max_tokens is not None and asked.max_completion_tokens is not None:
            raise ApiError(
                400, "max_tokens and max_completion_tokens mean the same; leave one out", "invalid_value", "max_tokens"
            )
        field = "max_tokens" if asked.max_tokens is not None else "max_completion_tokens"
        messages = [message.as_dict() for message in asked.messages]
        task = await service.task(asked, request, messages=messages, lengths=getattr(asked, field), length_field=field)
        return await service.answer(asked, task, request, is_chat=True)

    @app.post("/v1/infill")
    async def infill(asked: Infill, request: Request) -> Response:
        given: dict[str, Any] = {"prompts": [asked.prefix], "suffix": asked.suffix, "length_field": "length_tokens"}
        if isinstance(asked.length_tokens, int):
            task = await service.task(asked, request, lengths=asked.length_tokens, **given)
            return await service.answer(asked, task, request, is_chat=False)
        return await service.infill_best(asked, given, request)

    @app.post("/v1/score")
    async def score(asked: Score, request: Request) -> Response:
        await service.check_model(asked.model)
        with service.admitted(request, 1):
            event = await backend.score(asked.model, asked.text, asked.draws, asked.seed)
        raise_error(event)
        return JSONResponse({"object": "score", "model": asked.model, **event})

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": await backend.describe()}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        found = {card["id"]: card for card in await backend.describe()}
        if name not in found:
            raise no_model(name, list(found))
        return found[name]

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/readyz")
    async def readyz() -> Response:
        try:
            async with asyncio.timeout(5):
                await backend.describe()
        except (TimeoutError, ReplicaLost):
            raise ApiError(503, "no replica answers yet", "not_ready", retry_after_seconds=1) from None
        return JSONResponse({"status": "ready"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(
            counts.render({"texts_under_way": admission.num_texts, "texts_capacity": admission.capacity_texts})
        )

    if server.http.playground:
        for path, (name, media_type) in _PAGE.items():
            app.add_api_route(path, _page(name, media_type), include_in_schema=False)
    paths = [route.path for route in app.routes if hasattr(route, "path")]
    return Middleware(
        app, keys=keys, body_bytes=server.limits.body_bytes, counts=counts, known_paths=paths, is_named=is_named
    )


def _page(name: str, media_type: str) -> Any:
    content = resources.files("dlm_ray.serving.http.playground").joinpath(name).read_bytes()
    policy = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"

    async def page() -> Response:
        return Response(
            content,
            media_type=media_type,
            headers={"content-security-policy": policy, "x-content-type-options": "nosniff"},
        )

    return page


def _add_errors(app: FastAPI) -> None:
    """Whatever goes wrong is said in one form."""

    @app.exception_handler(ApiError)
    async def own(request: Request, error: ApiError) -> Response:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        findings = error.errors()
        first = findings[0]
        place = [str(part) for part in first["loc"] if part != "body"]
        names = [part for part in place if part.isidentifier() and not part.startswith(("function", "constrained"))]
        param = names[0] if names else None
        same = [finding["msg"] for finding in findings if finding["loc"][:2] == first["loc"][:2]]
        whys = " or: ".join(dict.fromkeys(same))  # each form that a field may have says what is wrong with it
        what = {"extra_forbidden": "is not supported by this service", "missing": "is missing"}.get(first["type"], whys)
        message = f"{'.'.join(place[:1]) or 'the body'}: {what}".encode(errors="replace").decode()[:500]
        code = "unsupported_field" if first["type"] == "extra_forbidden" else "invalid_value"
        return await own(request, ApiError(400, message, code, param and param[:100]))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        return await own(request, ApiError(error.status_code, f"{error.detail}: see /openapi.json", code))

    @app.exception_handler(ReplicaLost)
    async def lost(request: Request, error: ReplicaLost) -> Response:
        return await own(
            request, ApiError(503, "the replica that worked on this is gone; try again", "replica_lost", None, 1)
        )

    @app.exception_handler(Exception)
    async def internal(request: Request, error: Exception) -> Response:
        log.error("%s failed", getattr(request.state, "request_id", "?"), exc_info=error)
        return await own(
            request, ApiError(500, "something went wrong here; the log says what under the request id", "internal")
        )
