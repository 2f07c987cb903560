"""What a test can see of a deployment from its bus: members, requests, results, connections."""

from __future__ import annotations

import asyncio
import json
import re
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import nats

from llmserve.bus.base import StoredRequest
from llmserve.bus.messages import AnyMessage, Heartbeat, Result, Role, decode
from llmserve.bus.nats import NatsBus, connect
from llmserve.bus.settings import BusSettings
from llmserve.manifests.loader import load
from tests.processes import Process, metrics, total
from tests.services import Services

WORKERS = (Role.PREFILL, Role.DECODE, Role.BOTH)


@dataclass
class Observer:
    """Hears all heartbeats and follows the request stream, as one more member that does nothing."""

    services: Services
    bus: NatsBus
    beats: dict[str, Heartbeat] = field(default_factory=dict)
    """The last one of every member that was ever heard."""
    heard_s: dict[str, float] = field(default_factory=dict)
    seen: dict[int, StoredRequest] = field(default_factory=dict)
    """Every request that was on the stream when the observer could look."""

    on_beat: Callable[[Heartbeat], None] | None = None

    @classmethod
    async def open(cls, services: Services) -> Observer:
        manifest = load(services.manifest)
        settings = BusSettings.from_manifest(manifest)
        bus = await connect(services.nats_url, None, manifest.metadata.name, member="observer", settings=settings)
        observer = cls(services, bus)
        await bus.subscribe(bus.subjects.heartbeats, observer._hear)
        await bus.follow(lambda stored: observer.seen.update({stored.seq: stored}))
        return observer

    async def close(self) -> None:
        await self.bus.close()

    def _hear(self, message: AnyMessage) -> None:
        if isinstance(message, Heartbeat):
            self.beats[message.member] = message
            self.heard_s[message.member] = time.monotonic()
            if self.on_beat is not None:
                self.on_beat(message)

    async def member(self, process: Process, timeout_s: float = 10.0) -> str:
        """Member id of a process; waits until it was heard."""
        async with asyncio.timeout(timeout_s):
            while True:
                for beat in self.beats.values():
                    if beat.pid == process.pid:
                        return beat.member
                await asyncio.sleep(0.05)

    def left_by(self, gateway: str) -> int:
        """Requests of a gateway that live workers run or hold."""
        seqs = {seq for seq, item in self.seen.items() if item.request.gateway == gateway}
        return len({line.seq for beat in self.live_workers() for line in beat.running} & seqs)

    async def stored_by(self, gateway: str) -> int:
        """Requests of a gateway that are on the stream."""
        stored = (await self.bus.contents()).seqs
        return sum(item.request.gateway == gateway for seq, item in self.seen.items() if seq in stored)

    def live_workers(self) -> list[Heartbeat]:
        alive = {process.pid for process in self.services.processes.values() if process.child.poll() is None}
        return [beat for beat in self.beats.values() if beat.role in WORKERS and beat.pid in alive]

    async def leader(self, timeout_s: float = 15.0) -> str:
        """Name of the process whose router leads; waits until one does."""
        end = time.monotonic() + timeout_s
        while True:
            member, _ = await self.bus.leader()
            pid = self.beats[member].pid if member in self.beats else 0
            for name, process in self.services.processes.items():
                if process.pid == pid and process.child.poll() is None:
                    return name
            assert time.monotonic() < end, f"router {member!r} leads and does not run"
            await asyncio.sleep(0.02)

    async def unsettled(self) -> dict[str, object]:
        """What is still queued, running or held, and where; empty when all is over and given back."""
        left: dict[str, object] = {"stored": sorted((await self.bus.contents()).seqs)}
        for beat in self.live_workers():
            left[f"{beat.member} runs"] = [line.seq for line in beat.running]
            left[f"{beat.member} pages"] = beat.pages_total - beat.pages_free
        router = self.services.processes[await self.leader()]
        url = next(word for word in router.output.split("metrics: ")[1].split() if word.startswith("http"))
        figures = await asyncio.to_thread(metrics, url)
        left["queued"] = total(figures, "llmserve_queue_depth")
        left["tokens in flight"] = total(figures, "llmserve_tokens_in_flight")
        left["pages set aside"] = total(figures, "llmserve_kv_pages", state="used")
        return {what: value for what, value in left.items() if value}

    async def settled(self, timeout_s: float) -> None:
        """Wait until all is over and every page and credit is back."""
        end = time.monotonic() + timeout_s
        while left := await self.unsettled():
            assert time.monotonic() < end, f"{timeout_s:g} s later: {left}"
            await asyncio.sleep(0.1)

    async def results(self) -> tuple[dict[str, Result], int]:
        """(result of every request, how many times a result was recorded)."""
        client = await nats.connect(self.services.nats_url.split(","), token="secret")
        try:
            stream = client.jetstream()
            info = await stream.stream_info(self.bus.subjects.result_stream)
            found: dict[str, Result] = {}
            subscription = await stream.subscribe(self.bus.subjects.all_results, ordered_consumer=True)
            for _ in range(info.state.messages):
                result = decode((await subscription.next_msg(timeout=5)).data)
                assert isinstance(result, Result)
                found[result.request_id] = result
            return found, info.state.last_seq
        finally:
            await client.close()

    def connections(self) -> Counter[tuple[str, int]]:
        """(name without its incarnation, number of subscriptions) of everything connected to the server."""
        with urllib.request.urlopen(f"{self.services.monitor}/connz?limit=10000", timeout=5) as response:
            rows = json.load(response)["connections"]
        names = [re.sub(r"-[0-9a-f]{8,}$", "", row.get("name", "")) for row in rows]
        return Counter((name, int(row["subscriptions"])) for name, row in zip(names, rows, strict=True))

    def consumers(self) -> int:
        """Consumers of all streams."""
        with urllib.request.urlopen(f"{self.services.monitor}/jsz", timeout=5) as response:
            return int(json.load(response)["consumers"])
