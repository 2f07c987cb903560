"""A kv role's keeper at work on real files, and a bus that keeps what it tells."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from prometheus_client import CollectorRegistry

from llmserve.bus.base import BusError
from llmserve.bus.messages import AnyMessage, Heartbeat, KvEvents, Role, Tier
from llmserve.bus.subjects import Subjects
from llmserve.kvstore.keys import PageKey
from llmserve.manifests.schema import Manifest
from llmserve.workers.kv_pages import PageKeeper
from tests.bus.samples import until
from tests.manifests.samples import manifest

KIND = "f00d" * 4
GB = 2**30


def key(number: int, space: str = "t-a", fingerprint: str = KIND) -> PageKey:
    return PageKey(fingerprint, space, number.to_bytes(32, "big"))


def plant(folder: Path, keys: list[PageKey], size: int = 1000, age_s: float = 0.0) -> None:
    """Files as workers write them."""
    for page in keys:
        file = folder / page.path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes(size))
        if age_s:
            os.utime(file, (time.time() - age_s,) * 2)


class FakeBus:
    """What the keeper needs of a bus."""

    def __init__(self) -> None:
        self.subjects = Subjects("d")
        self.told: list[KvEvents] = []
        self.gone: BusError | None = None
        """Raised by all that would be published."""
        self.handlers: dict[str, object] = {}

    async def subscribe(self, subject: str, handler: object) -> FakeBus:
        self.handlers[subject] = handler
        return self

    async def unsubscribe(self) -> None:
        """Nothing to end."""

    def publish(self, subject: str, message: AnyMessage) -> None:
        assert subject == self.subjects.kv_events
        assert isinstance(message, KvEvents)
        if self.gone is not None:
            raise self.gone
        self.told.append(message)

    def hear(self, subject: str, message: AnyMessage) -> None:
        self.handlers[subject](message)  # type: ignore[operator]

    def engine_joins(self, fingerprint: str = KIND) -> None:
        beat = Heartbeat(member="w", role=Role.PREFILL, host="h", pid=1, fingerprint=fingerprint, page_tokens=16)
        self.hear(self.subjects.heartbeats, beat)

    def held(self) -> dict[tuple[Tier, str], set[bytes]]:
        """What the router knows, by tier and host."""
        known: dict[tuple[Tier, str], set[bytes]] = {}
        for number, event in enumerate(self.told):
            assert event.seq == number + 1
            if event.snapshot:
                known.clear()
            for change in event.changes:
                place = known.setdefault((change.tier, event.host), set())
                place.difference_update(cut(change.removed))
                place.update(cut(change.stored))
        return known


def cut(hashes: bytes) -> list[bytes]:
    return [hashes[start : start + 8] for start in range(0, len(hashes), 8)]


@asynccontextmanager
async def keeping(
    made: Manifest, *, ready: bool = True, registry: CollectorRegistry | None = None
) -> AsyncIterator[tuple[PageKeeper, FakeBus]]:
    """A keeper at work; with ``ready`` it has listed everything."""
    bus = FakeBus()
    keeper = PageKeeper(made, bus, "kv-1", "host", registry or CollectorRegistry())  # type: ignore[arg-type]
    running = asyncio.create_task(keeper.run())
    try:
        await (asyncio.wait_for(keeper.ready.wait(), 30) if ready else until(lambda: len(bus.handlers) == 2))
        yield keeper, bus
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running


def with_folder(folder: Path, *, capacity: int | None = None, more: str = "", eviction: str = "") -> Manifest:
    bound = "" if capacity is None else f", capacity_gb: {capacity / GB:.12f}"
    evicts = f", eviction: {{{eviction}}}" if eviction else ""
    classes = f"storageClasses: [{{name: disk, type: filesystem, path: {folder}{bound}}}{more}]"
    tenants = "scheduling: {fair_share: {tenants: {a: {}, b: {}}}}"
    return manifest(f"{classes}, {tenants}, kv_cache: {{dram_gb: 0.1{evicts}}}")
