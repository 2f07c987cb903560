"""The gateway's middleware around a small application, without vLLM."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import httpx
import uvicorn
from prometheus_client import CollectorRegistry
from starlette.types import Receive, Scope, Send

from llmserve.gateway.access import Access
from llmserve.gateway.caller import current_caller
from llmserve.gateway.http_bounds import HttpBounds, bounded_protocol
from llmserve.gateway.metrics import GatewayMetrics
from llmserve.gateway.middleware import GatewayMiddleware, RequestBounds
from llmserve.gateway.tls import ServerTls
from llmserve.manifests.schema import Manifest
from tests.manifests.samples import manifest

CHAT = "/v1/chat/completions"


class Ready:
    def missing(self) -> str:
        return ""


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the size of the body; ``/slow`` takes a second, ``/endless`` sends until the client has gone."""
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    if scope["path"] == "/slow":
        await asyncio.sleep(1)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    caller = current_caller.get()
    assert caller is not None
    caller.accepted = True
    gone = asyncio.ensure_future(receive())
    while scope["path"] == "/endless" and not gone.done():
        await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
        await asyncio.sleep(0)
    gone.cancel()
    await send({"type": "http.response.body", "body": str(size).encode()})


class Toy:
    """``client`` talks to the middleware in memory."""

    def __init__(self, spec: str, bounds: RequestBounds | None = None) -> None:
        self.manifest: Manifest = manifest(spec)
        self.registry = CollectorRegistry()
        self.metrics = GatewayMetrics(self.registry)
        self.access = Access.of(self.manifest, self.metrics)
        bounds = bounds or RequestBounds(body_bytes=1 << 20, file_bytes=1 << 20)
        self.app = GatewayMiddleware(echo, self.access, Ready(), self.metrics, bounds)
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://gw")

    async def post(self, path: str, key: str = "", body: bytes = b"{}") -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return await self.client.post(path, content=body, headers=headers)

    @contextlib.asynccontextmanager
    async def served(self, bounds: HttpBounds, tls: ServerTls | None = None) -> AsyncIterator[tuple[str, int]]:
        """Behind a real socket; (host, port)."""
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        protocol = bounded_protocol(bounds, self.metrics)
        server = uvicorn.Server(
            uvicorn.Config(
                self.app,
                http=protocol,
                lifespan="off",
                log_config=None,
                ws="none",
                ssl_context_factory=None if tls is None else lambda *_: tls.context,
            )
        )
        serving = asyncio.create_task(server._serve([listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        try:
            yield listener.getsockname()
        finally:
            server.should_exit = server.force_exit = True
            await serving
