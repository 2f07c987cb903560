"""The gateway role: serves the OpenAI API for one deployment, from a bus that somebody else connected."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import uvicorn
from prometheus_client import CollectorRegistry
from starlette.datastructures import State

from llmserve.bus.base import Bus, Subscription
from llmserve.bus.cache_salt import CacheSalts
from llmserve.bus.membership import Beater
from llmserve.bus.messages import AnyMessage, Heartbeat, Role
from llmserve.bus.nats import NatsBus
from llmserve.gateway.access import Access
from llmserve.gateway.batch_service import BatchService
from llmserve.gateway.http_bounds import HttpBounds, bounded_protocol
from llmserve.gateway.log import quiet_expected_failures
from llmserve.gateway.metrics import GatewayMetrics
from llmserve.gateway.middleware import GatewayMiddleware, RequestBounds
from llmserve.gateway.readiness import Readiness, needed_roles
from llmserve.gateway.reload import Reloader
from llmserve.gateway.spending import SpendingReports
from llmserve.gateway.tls import ServerTls
from llmserve.gateway.vllm_app import VllmApp, build_vllm_app, prepare_environment
from llmserve.manifests.schema import Manifest

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

    from llmserve.gateway.channel import Channel
    from llmserve.gateway.engine_client import BusEngineClient

log = logging.getLogger(__name__)


class _Server(uvicorn.Server):
    """uvicorn as a part of a larger process: signals belong to the process."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Gateway:
    """``start`` builds the server and binds the port, ``serve`` runs until ``stop``."""

    def __init__(
        self,
        manifest: Manifest,
        bus: Bus,
        member_id: str,
        registry: CollectorRegistry,
        *,
        deadline_s: float = 600.0,
        drain_s: float = 5.0,
        host: str | None = None,
        port: int | None = None,
        read_manifest: Callable[[], Manifest] | None = None,
    ) -> None:
        """``deadline_s``: longest wait of a request for its next token; ``drain_s``: for open responses at the stop.

        ``host`` and ``port`` override the manifest's; ``read_manifest`` reads it again for a reload.
        """
        self._manifest = manifest
        self._bus = bus
        self._member_id = member_id
        self._metrics = GatewayMetrics(registry)
        self._deadline_s = deadline_s
        self._drain_s = drain_s
        self._host = manifest.spec.gateway.host if host is None else host
        self._port = manifest.spec.gateway.port if port is None else port
        self._readiness = Readiness(needed_roles(manifest))
        self._heartbeats: Subscription | None = None
        self._beater = Beater(bus, self._heartbeat)
        self._access = Access.of(manifest, self._metrics)
        self._spending = SpendingReports(bus, member_id, self._access.limits)
        self._reloader = Reloader(
            bus, member_id, self._metrics, manifest, read_manifest or (lambda: manifest), self._apply
        )
        self._tls = ServerTls(manifest.spec.gateway.tls) if manifest.spec.gateway.tls is not None else None
        self._batches: BatchService | None = None
        self._watching: asyncio.Task[None] | None = None
        self._leaving = False
        self._vllm: VllmApp | None = None
        self._socket: socket.socket | None = None
        self._server: _Server | None = None
        self._served = asyncio.Event()

    @property
    def url(self) -> str:
        """Of the API, known after ``start``."""
        assert self._socket is not None
        host, port = self._socket.getsockname()[:2]
        scheme = "http" if self._tls is None else "https"
        return f"{scheme}://{host}:{port}"

    @property
    def engine(self) -> AsyncLLM:
        """vLLM's side of the gateway, known after ``build``."""
        assert self._vllm is not None
        return self._vllm.engine

    @property
    def app_state(self) -> State:
        """Where vLLM's server keeps its serving classes, known after ``build``."""
        assert self._vllm is not None
        return self._vllm.app.state

    @property
    def channel(self) -> Channel:
        """The bus's side of the gateway, known after ``build``."""
        return self._client.channel

    async def start(self) -> None:
        """Build the server, listen on the bus and bind the port. Raises ``OSError`` if the port is taken."""
        begun_s = time.monotonic()
        self._socket = _bind(self._host, self._port)
        self.app = await self.build()
        config = uvicorn.Config(
            self.app,
            loop="none",
            http=bounded_protocol(HttpBounds.from_manifest(self._manifest.spec.gateway), self._metrics),
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=max(1, round(self._drain_s)),
            ssl_context_factory=None if self._tls is None else self._tls_context,
        )
        self._server = _Server(config)
        log.info("gateway built in %.1f s, serving on %s", time.monotonic() - begun_s, self.url)

    async def build(self) -> GatewayMiddleware:
        """The ASGI application alone, its channel running: what ``start`` puts behind a socket."""
        # Imports vLLM: seconds of work, and only for those who serve.
        prepare_environment()
        client_class = await asyncio.to_thread(self._import_client)
        self._client = client_class(
            self._bus, self._member_id, engine_api(), self._salts(), self._metrics, deadline_s=self._deadline_s
        )
        self._vllm = await build_vllm_app(self._manifest, self._client)
        quiet_expected_failures()
        await self._client.channel.start()
        self._heartbeats = await self._bus.subscribe(self._bus.subjects.heartbeats, self._hear)
        self._beater.start()
        await self._spending.start()
        await self._reloader.start()
        if isinstance(self._bus, NatsBus):
            service = BatchService(
                self._manifest,
                self._bus,
                self._member_id,
                self._vllm.app,
                self._vllm.front,
                self._access,
                self._metrics,
            )
            await service.start()
            self._batches = service
        if self._tls is not None:
            self._watching = asyncio.create_task(self._tls.watch())
        gateway = self._manifest.spec.gateway
        bounds = RequestBounds(
            gateway.max_body_kb << 10,
            gateway.batch.max_file_mb << 20,
            gateway.body_timeout_s,
            gateway.request_timeout_s,
        )
        return GatewayMiddleware(self._vllm.front, self._access, self._readiness, self._metrics, bounds)

    async def serve(self) -> None:
        """Answer requests until ``stop`` is called."""
        assert self._server is not None
        assert self._socket is not None
        try:
            await self._server.serve(sockets=[self._socket])
        finally:
            self._served.set()

    def _tls_context(self, *_: object) -> ssl.SSLContext:
        assert self._tls is not None
        return self._tls.context

    def _apply(self, manifest: Manifest) -> None:
        """What a reload changes. Raises ``ManifestError``."""
        if self._tls is not None:
            self._tls.refresh()
        self._access.change(manifest)
        if self._batches is not None:
            self._batches.change(manifest)

    def reload(self) -> None:
        """Read the manifest again; errors are logged and change nothing."""
        self._reloader.reload()

    async def stop(self) -> None:
        """Let open responses end within ``drain_s``, cancel the rest, and leave the deployment."""
        if self._server is not None and self._server.started:
            self._server.should_exit = True
            with contextlib.suppress(TimeoutError):
                # uvicorn cancels what is still open after its own, shorter timeout.
                await asyncio.wait_for(self._served.wait(), self._drain_s + 2.0)
        if self._socket is not None:
            self._socket.close()
        if self._batches is not None:
            await self._batches.stop()
        if self._vllm is not None:
            await self._client.channel.stop()
            self._vllm.close()
            await self._beater.stop()
            self._leaving = True
            self._beater.beat()
        if self._watching is not None:
            self._watching.cancel()
        await self._reloader.stop()
        await self._spending.stop()
        if self._heartbeats is not None:
            await self._heartbeats.unsubscribe()

    def _import_client(self) -> type[BusEngineClient]:
        from llmserve.gateway.engine_client import BusEngineClient

        return BusEngineClient

    def _salts(self) -> CacheSalts:
        return CacheSalts(self._manifest.metadata.name, self._manifest.spec.security.cache_sharing)

    def _hear(self, message: AnyMessage) -> None:
        self._readiness.hear(message)
        self._client.channel.block_size.hear(message)

    def _heartbeat(self) -> Heartbeat:
        return Heartbeat(
            member=self._member_id,
            role=Role.GATEWAY,
            host=socket.gethostname(),
            pid=os.getpid(),
            api=engine_api(),
            metrics_port=self._manifest.spec.gateway.metrics_port,
            leaving=self._leaving,
        )


def engine_api() -> str:
    """Engine API of the bodies that this gateway writes, such as ``vllm-0.32.0``."""
    from vllm import __version__

    return f"vllm-{__version__.partition('+')[0]}"


def _bind(host: str, port: int) -> socket.socket:
    infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = infos[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Accepted connections inherit it: a token must not wait for the acknowledgement of the one before.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener
