"""All roles of a deployment in one process: what ``llmserve up`` runs."""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import secrets
import socket
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry

from llmserve.bus.collector import loading
from llmserve.bus.endpoint import BusEndpoint
from llmserve.bus.flow.settings import RouterSettings
from llmserve.bus.messages import Role
from llmserve.bus.metrics import BusMetrics
from llmserve.bus.nats import NatsBus, connect
from llmserve.bus.server import EmbeddedServer
from llmserve.bus.settings import BusSettings
from llmserve.bus.telemetry import MetricsServer
from llmserve.cli.display import Progress
from llmserve.manifests.gpus import engine_gpus
from llmserve.manifests.machine import probe_machine
from llmserve.manifests.schema import Manifest
from llmserve.manifests.state import state_dir
from llmserve.workers.engine import preload
from llmserve.workers.kv import KvService
from llmserve.workers.metrics import WorkerMetrics
from llmserve.workers.router_service import RouterService
from llmserve.workers.service import WorkerService

if TYPE_CHECKING:
    from llmserve.gateway.gateway import Gateway

logger = logging.getLogger("llmserve.up")


class StackFailed(Exception):
    """A part ended that should not have."""


class Stack:
    """``start`` everything, ``run`` until cancelled or a part fails, ``stop``; nothing is left behind."""

    def __init__(
        self,
        manifest: Manifest,
        progress: Progress,
        nats_url: str | None = None,
        read_manifest: Callable[[], Manifest] | None = None,
    ) -> None:
        self.manifest = manifest
        self._read_manifest = read_manifest
        self.registry = CollectorRegistry()
        self._progress = progress
        self._nats_url = nats_url or manifest.spec.bus.url
        self._closing = AsyncExitStack()
        self._tasks: list[asyncio.Task[None]] = []
        self._bus_metrics = BusMetrics(self.registry)
        self._worker_metrics = WorkerMetrics(self.registry)
        self._gateway: Gateway | None = None
        self._metrics = MetricsServer(
            self.registry, manifest.spec.gateway.host, manifest.spec.gateway.metrics_port, self._alive
        )
        self.started = False

    @property
    def metrics_url(self) -> str:
        return self._metrics.url

    def _alive(self) -> bool:
        return not any(task.done() for task in self._tasks)

    @property
    def url(self) -> str:
        """Of the API, known after ``start``."""
        assert self._gateway is not None
        return self._gateway.url

    async def start(self) -> None:
        """Start every part. Raises ``BusError``, ``EngineError``, ``OSError`` or ``ModelError``: one line each."""
        with loading(10_000):  # as a gateway's process does: of all parts it makes most of what is collected
            await self._start()
        self.started = True

    async def _start(self) -> None:
        gateway = self.manifest.spec.gateway
        _require_free(gateway.host, gateway.port, "spec.gateway.port")
        await self._metrics.start()
        self._closing.push_async_callback(self._metrics.stop)
        endpoint = await self._start_nats()
        await self._start_router(endpoint)
        async with self._progress.part("vllm", "imports"):
            # Once and by one thread: vLLM's and transformers' lazy imports are not safe in several.
            await asyncio.to_thread(_import_vllm, self.manifest)
        async with asyncio.TaskGroup() as parts:
            parts.create_task(self._start_gateway(endpoint))
            if self.manifest.spec.storageClasses:
                parts.create_task(self._start_kv(endpoint))
            for (role, index), gpus in zip(self._engines(), self._gpus(), strict=True):
                parts.create_task(self._start_worker(endpoint, role, f"{role}-{index}", gpus))
        self._spawn(self._bus_metrics.run(), "bus metrics")

    async def run(self) -> None:
        """Serve until cancelled. Raises ``StackFailed`` when a part ends by itself."""
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            error = None if task.cancelled() else task.exception()
            raise StackFailed(f"{task.get_name()} ended: {error or 'without an error'}") from error

    def reload(self) -> None:
        """Read keys, limits and certificates again."""
        if self._gateway is not None:
            self._gateway.reload()

    async def stop(self) -> None:
        """Stop every part, the last started first."""
        for task in self._tasks:
            task.cancel()
        await self._closing.aclose()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _engines(self) -> list[tuple[Role, int]]:
        """Role and number within it, prefill first."""
        replicas = self.manifest.spec.deployment.replicas
        last = Role.DECODE if replicas.prefill else Role.BOTH
        prefill = [(Role.PREFILL, index) for index in range(replicas.prefill)]
        return prefill + [(last, index) for index in range(replicas.decode)]

    def _gpus(self) -> list[tuple[str, ...]]:
        return engine_gpus(self.manifest, probe_machine(), os.environ)

    def _spawn(self, work: Coroutine[None, None, None], name: str) -> None:
        self._tasks.append(asyncio.create_task(work, name=name))

    async def _connect(self, endpoint: BusEndpoint, member: str) -> NatsBus:
        settings = BusSettings.from_manifest(self.manifest)
        name = self.manifest.metadata.name
        bus = await connect(endpoint.url, endpoint.token, name, member=member, settings=settings)
        self._bus_metrics.add(bus)
        self._closing.push_async_callback(bus.close)
        return bus

    async def _start_nats(self) -> BusEndpoint:
        if self._nats_url:
            self._progress.line(f"  nats         external          {self._nats_url.rpartition('@')[2]}")
            return BusEndpoint(self._nats_url, self.manifest.spec.bus.token)
        async with self._progress.part("nats", "embedded server, JetStream on files"):
            server = EmbeddedServer(
                state_dir(self.manifest, os.environ),
                sync=self.manifest.spec.bus.sync,
            )
            server.start()
        self._closing.callback(server.stop)
        self._spawn(server.supervise(), "nats")
        return BusEndpoint(server.url, server.token)

    async def _start_router(self, endpoint: BusEndpoint) -> None:
        async with self._progress.part("router"):
            bus = await self._connect(endpoint, "router")
            service = RouterService(bus, RouterSettings.from_manifest(self.manifest), self.registry)
            self._spawn(service.run(), "router")
        self._closing.push_async_callback(service.stop)

    async def _start_kv(self, endpoint: BusEndpoint) -> None:
        names = ", ".join(storage.name for storage in self.manifest.spec.storageClasses)
        async with self._progress.part("kv", f"keeps the pages in {names}"):
            bus = await self._connect(endpoint, "kv")
            service = KvService(self.manifest, bus, "kv", self.registry)
            self._closing.push_async_callback(service.stop)
        self._spawn(service.run(), "kv")

    async def _start_gateway(self, endpoint: BusEndpoint) -> None:
        async with self._progress.part("gateway", "vLLM's OpenAI server, without an engine"):
            from llmserve.gateway.gateway import Gateway

            member = member_id("gateway")
            bus = await self._connect(endpoint, member)
            self._gateway = Gateway(
                self.manifest, bus, member, self.registry, drain_s=2.0, read_manifest=self._read_manifest
            )
            await self._gateway.start()
        self._closing.push_async_callback(self._gateway.stop)
        self._spawn(self._gateway.serve(), "gateway")

    async def _start_worker(self, endpoint: BusEndpoint, role: Role, name: str, gpus: tuple[str, ...]) -> None:
        model = self.manifest.spec.models.primary.id
        async with self._progress.part(name, f"{self.manifest.spec.engine.kind} engine, {model}"):
            bus = await self._connect(endpoint, name)
            service = WorkerService(
                self.manifest,
                role,
                bus,
                name,
                self._worker_metrics,
                engine_mode="process",
                gpus=gpus,
                restart=True,
            )
            self._closing.push_async_callback(service.stop)
            await service.start()
        self._spawn(service.run(), name)


def member_id(name: str) -> str:
    """A member id of this incarnation: a restarted one is another member."""
    return f"{name}-{secrets.token_hex(4)}"


def _import_vllm(manifest: Manifest) -> None:
    from llmserve.gateway.vllm_app import prepare_environment

    prepare_environment()
    preload(manifest)
    importlib.import_module("vllm.entrypoints.openai.api_server")


def _require_free(host: str, port: int, field: str) -> None:
    """Raise ``OSError`` at once for a taken port, not after the engines have started."""
    if not port:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise OSError(error.errno, f"{field}: {host}:{port}: {error.strerror}") from error
