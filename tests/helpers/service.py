"""What tests of the service share: the application in this process, over ASGI or on a port of loopback."""

import asyncio
import contextlib
import threading

import httpx

from dlm_ray.config.server import Server
from dlm_ray.serving.http.app import build
from dlm_ray.serving.worker import EngineWorker
from helpers.processes import free_port, until


class Local:
    """A host as the application's backend."""

    def __init__(self, host):
        self.host, self.generate = host, host.generate

    async def describe(self):
        return [self.host.describe()]

    async def score(self, model, *asked):
        return await self.host.score(*asked)


@contextlib.contextmanager
def hosted(checkpoint, keys=(), capacity_texts=96, **parts):
    """(host, application) of a server with these parts."""
    server = Server(checkpoint=str(checkpoint), name="tiny", **parts)
    host = EngineWorker(server)
    try:
        yield host, build(server, Local(host), list(keys), capacity_texts)
    finally:
        host.close()


def client(app, **options):
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://service", timeout=60, **options)


@contextlib.contextmanager
def listening(app):
    """The URL of the application on a free port."""
    import uvicorn

    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", lifespan="off"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)
