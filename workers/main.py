"""``llmserve-worker``: one worker, router or kv manager as a process of its own."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry

from llmserve.bus.base import BusError
from llmserve.bus.collector import loading, rest_collector
from llmserve.bus.endpoint import BusEndpoint, bus_endpoint
from llmserve.bus.messages import Role
from llmserve.bus.subjects import is_token
from llmserve.manifests.errors import ManifestError
from llmserve.manifests.loader import load, resolve
from llmserve.manifests.schema import Manifest
from llmserve.manifests.support import require_supported
from llmserve.workers.engine.base import EngineError, EngineInfo
from llmserve.workers.worker import WorkerDied

if TYPE_CHECKING:
    from llmserve.bus.nats import NatsBus
    from llmserve.workers.service import WorkerService

logger = logging.getLogger("llmserve.worker")

ROLES = (Role.PREFILL, Role.DECODE, Role.BOTH, Role.KV, Role.ROUTER)
_CLOSE_S = 8.0
"""For an engine to close after the second signal."""


class UsageError(Exception):
    """A wrong option; the message is one line."""


@dataclass(frozen=True, slots=True)
class Options:
    """The command line, checked."""

    role: Role
    name: str
    nats_url: str | None
    token: str | None
    metrics_port: int
    drain_s: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT. Exit 0 after draining, 1 if the engine died, 2 with one line on bad input."""
    parsed = _parser().parse_args(arguments)
    try:
        options = _options(parsed)
        manifest = resolve(load(parsed.manifest), os.environ)
        require_supported(manifest)
        import uvloop

        return uvloop.run(_serve(manifest, options, parsed.json_log))
    except (ManifestError, BusError, EngineError, UsageError) as error:
        print(f"llmserve-worker: {error}", file=sys.stderr)
        return 2
    except WorkerDied as error:
        print(f"llmserve-worker: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llmserve-worker", description="Join a deployment and take part in it.")
    parser.add_argument("--role", required=True, choices=[role.value for role in ROLES])
    parser.add_argument("--manifest", required=True, metavar="FILE")
    parser.add_argument(
        "--nats", metavar="URL", help="the bus; the manifest's, or that of 'llmserve up' here, otherwise"
    )
    parser.add_argument("--token", metavar="TOKEN", help="of the bus, or env:NAME")
    parser.add_argument(
        "--metrics-port", type=int, default=0, metavar="PORT", help="0, the default, takes a free one"
    )
    parser.add_argument("--name", help="in metrics and logs; <role>-<host> by default")
    parser.add_argument("--drain-s", type=float, default=30.0, metavar="S", help="to finish in after SIGTERM")
    parser.add_argument("--json-log", action="store_true", help="log JSON lines even at a terminal")
    return parser


def _options(parsed: argparse.Namespace) -> Options:
    """Raises ``UsageError``."""
    role = Role(parsed.role)
    name = parsed.name or f"{role}-{socket.gethostname().partition('.')[0]}"[:50]
    if not is_token(name) or len(name) > 50:
        raise UsageError(f"--name: {name!r} is not 1 to 50 letters, digits, '_' and '-'")
    if not 0 <= parsed.metrics_port <= 65535:
        raise UsageError(f"--metrics-port: {parsed.metrics_port} is not a port, 0 to 65535 are")
    if not 0 <= parsed.drain_s <= 86400:
        raise UsageError(f"--drain-s: {parsed.drain_s:g} is not between 0 and 86400")
    token = parsed.token
    if token is not None and token.startswith("env:"):
        variable = token.removeprefix("env:")
        token = os.environ.get(variable)
        if not token:
            raise UsageError(f"--token: the environment variable {variable} is not set or empty")
    return Options(role, name, parsed.nats, token, parsed.metrics_port, parsed.drain_s)


async def _serve(manifest: Manifest, options: Options, json_log: bool) -> int:
    from llmserve.bus.metrics import BusMetrics
    from llmserve.bus.nats import connect
    from llmserve.bus.settings import BusSettings
    from llmserve.bus.telemetry import MetricsServer, configure_logging

    configure_logging(json=json_log or not sys.stderr.isatty())
    signals = _Signals()
    found = bus_endpoint(manifest, options.nats_url, os.environ)
    endpoint = BusEndpoint(found.url, options.token or found.token)
    registry = CollectorRegistry()
    bus_metrics = BusMetrics(registry)
    metrics = MetricsServer(registry, manifest.spec.gateway.host, options.metrics_port)
    async with AsyncExitStack() as closing:
        await metrics.start()
        closing.push_async_callback(metrics.stop)
        settings = BusSettings.from_manifest(manifest)
        bus = await connect(
            endpoint.url, endpoint.token, manifest.metadata.name, member=options.name, settings=settings
        )
        closing.push_async_callback(bus.close)
        bus_metrics.add(bus)
        sampling = asyncio.create_task(bus_metrics.run())
        closing.callback(sampling.cancel)
        part = _Part(manifest, options, bus, registry, metrics.url, metrics.port, _reachable_host(endpoint.url))
        if options.role is Role.ROUTER:
            return await part.route(signals)
        if options.role is Role.KV:
            return await part.manage_kv(signals)
        return await part.work(signals)


class _Signals:
    """SIGTERM and SIGINT: ``first`` asks for an orderly end, ``second`` for an immediate one."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._arrived)

    def _arrived(self) -> None:
        (self.second if self.first.is_set() else self.first).set()


@dataclass(frozen=True, slots=True)
class _Part:
    """What this process is in the deployment; each method serves until a signal and returns the exit status."""

    manifest: Manifest
    options: Options
    bus: NatsBus
    registry: CollectorRegistry
    metrics_url: str
    metrics_port: int
    host: str

    async def work(self, signals: _Signals) -> int:
        from llmserve.workers.metrics import WorkerMetrics
        from llmserve.workers.service import WorkerService
        from llmserve.workers.watchdog import ends_if_it_stands_still

        engine, model = self.manifest.spec.engine.kind, self.manifest.spec.models.primary.id
        begun_s = time.monotonic()
        self._say(f"starting: {engine} engine, model {model}")
        service = WorkerService(
            self.manifest,
            self.options.role,
            self.bus,
            self.options.name,
            WorkerMetrics(self.registry),
            host=self.host,
            metrics_port=self.metrics_port,
        )
        with loading(10_000):  # what an engine has loaded takes long to look through
            starting = asyncio.create_task(service.start())
            if not await _unless(signals.first, starting):
                return 0
        self._say(f"{_described(starting.result())}, ready after {time.monotonic() - begun_s:.1f} s")
        with ends_if_it_stands_still(self.manifest.spec.engine.stall_s):
            return await self._serve(service, signals)

    async def _serve(self, service: WorkerService, signals: _Signals) -> int:
        running = asyncio.create_task(service.run())
        try:
            if await _unless(signals.first, running, cancel=False):
                await running
            self._say(f"draining, {self.options.drain_s:g} s at most; a second signal stops at once")
            leaving = asyncio.create_task(service.stop(self.options.drain_s))
            if await _unless(signals.second, leaving):
                return 0
            return 130
        finally:
            await asyncio.wait_for(service.stop(), _CLOSE_S)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    async def route(self, signals: _Signals) -> int:
        from llmserve.bus.flow.settings import RouterSettings
        from llmserve.workers.router_service import RouterService

        settings = RouterSettings.from_manifest(self.manifest)
        service = RouterService(self.bus, settings, self.registry, self.options.name)
        rest_collector(50_000)  # it keeps much for long: whoever waits, and all tenants
        running = asyncio.create_task(service.run())
        self._say("routes, or stands by while another router leads")
        if not await _unless(signals.first, running, cancel=False):
            await service.stop()
        await running
        return 0

    async def manage_kv(self, signals: _Signals) -> int:
        from llmserve.workers.kv import KvService

        service = KvService(self.manifest, self.bus, self.options.name, self.registry, metrics_port=self.metrics_port)
        running = asyncio.create_task(service.run())
        self._say(service.duty)
        try:
            if await _unless(signals.first, running):
                await running
            return 0
        finally:
            await service.stop()

    def _say(self, what: str) -> None:
        print(f"{self.options.role} {self.options.name} {what}; metrics: {self.metrics_url}", flush=True)


async def _unless(event: asyncio.Event, task: asyncio.Task[object], *, cancel: bool = True) -> bool:
    """Wait for ``task``, or ``event``: then cancel the task, unless told not to, and return False."""
    waiting = asyncio.create_task(event.wait())
    await asyncio.wait((task, waiting), return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if task.done():
        return True
    if cancel:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    return False


def _described(info: EngineInfo) -> str:
    pages = f"{info.pages_total} pages of {info.page_tokens} tokens and {info.page_bytes / 1024:g} KB"
    return f"joined with {info.api}, {info.slots} slots, {pages}"


def _reachable_host(url: str) -> str:
    """The address of this host from which the bus is reached: loopback only if the bus is here."""
    parts = urlsplit(url.split(",")[0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((parts.hostname or "127.0.0.1", parts.port or 4222))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


if __name__ == "__main__":
    sys.exit(main())
