"""The kv role: the manager of a node's KV memory.

It gives back to the node what killed engines leave in shared memory, and keeps the pages of the storage classes, if
there are some (``kv_pages``).
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter

from llmserve.bus.base import Bus
from llmserve.bus.membership import Beater
from llmserve.bus.messages import Heartbeat, Role
from llmserve.manifests.schema import Manifest
from llmserve.workers.engine import shm
from llmserve.workers.kv_pages import PageKeeper


class KvManager:
    """Sweeps the node's shared memory every ``every_s`` seconds and counts what it gave back."""

    def __init__(
        self, registry: CollectorRegistry, every_s: float = 60.0, sweep: Callable[[], int] = shm.sweep
    ) -> None:
        self._every_s = every_s
        self._sweep = sweep
        self._reclaimed = Counter(
            "llmserve_shared_memory_reclaimed_bytes", "Shared memory of dead engines given back", registry=registry
        )

    async def run(self) -> None:
        """Sweep until cancelled."""
        while True:
            self._reclaimed.inc(await asyncio.to_thread(self._sweep))
            await asyncio.sleep(self._every_s)


class KvService:
    """The whole role as a member of the deployment."""

    def __init__(
        self, manifest: Manifest, bus: Bus, name: str, registry: CollectorRegistry, *, metrics_port: int = 0
    ) -> None:
        self._bus = bus
        self._member = f"{name}-{secrets.token_hex(4)}"
        self._metrics_port = metrics_port
        self._sweeper = KvManager(registry)
        self._pages: PageKeeper | None = None
        if manifest.spec.storageClasses:
            self._pages = PageKeeper(manifest, bus, self._member, socket.gethostname(), registry)
        names = ", ".join(storage.name for storage in manifest.spec.storageClasses)
        self.duty = f"keeps the pages in {names}" if names else "gives back shared memory of dead engines; no tiers"
        self._beater = Beater(bus, self._heartbeat)

    @property
    def pages(self) -> PageKeeper | None:
        """None without storage classes."""
        return self._pages

    def _heartbeat(self, *, leaving: bool = False) -> Heartbeat:
        return Heartbeat(
            member=self._member,
            role=Role.KV,
            host=socket.gethostname(),
            pid=os.getpid(),
            leaving=leaving,
            metrics_port=self._metrics_port,
            kv_seq=self._pages.kv_seq if self._pages is not None else 0,
            cache=self._pages.summary() if self._pages is not None else "",
        )

    async def run(self) -> None:
        """Serve until cancelled."""
        self._beater.start()
        async with asyncio.TaskGroup() as parts:
            parts.create_task(self._sweeper.run())
            if self._pages is not None:
                parts.create_task(self._pages.run())

    async def stop(self) -> None:
        """Say that the member leaves; after ``run`` was cancelled."""
        await self._beater.stop()
        self._bus.publish(self._bus.subjects.heartbeats, self._heartbeat(leaving=True))
