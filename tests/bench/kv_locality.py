"""Time to the first token on a trace of real conversations, by where requests are placed.

Mooncake's conversation trace (arrival times, lengths, and the blocks of 512 tokens that prompts share), made smaller:
a block is one page of 16 tokens, and time is compressed to the load that ``--load`` says. The router, the gateway's
channel and the workers are the real ones, over the bus in memory; the engines are simulated, with the paging and the
prefix cache of vLLM, and take the time that ``TIMING`` says; their tiers, DRAM and a folder with its kv role, hold
real pages (``tiered``). Placement by locality with the tiers is compared with round robin without them, twice: dealt
out as requests arrive, so that they wait at the workers, which is what the routers of other systems call so; and by
our router, which holds requests until a worker has credit and lets short ones go first. The latter once more with
prompts that share nothing. ``make bench-kv`` writes ``trace_ttft_ratio``, ``trace_ttft_ratio_same_router`` and
``no_reuse_ttft_ratio``; run alone it only prints.
"""

from __future__ import annotations

import argparse
import asyncio
import enum
import os
import random
import socket
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
from prometheus_client import CollectorRegistry

from llmserve.bus.block_hashes import short_hashes
from llmserve.bus.cache_salt import CacheSalts
from llmserve.bus.flow.credits import WorkerState
from llmserve.bus.flow.entry import Entry
from llmserve.bus.flow.placement import Placement
from llmserve.bus.flow.router import Router
from llmserve.bus.flow.settings import RouterSettings
from llmserve.bus.memory import MemoryBroker
from llmserve.bus.messages import Heartbeat, Role
from llmserve.gateway.attempts import Fail, Mode
from llmserve.gateway.call import Arrival, Call
from llmserve.gateway.channel import Channel
from llmserve.gateway.codec import RequestCodec
from llmserve.gateway.metrics import GatewayMetrics
from llmserve.manifests.schema import Manifest, Metadata, Models, PrimaryModel, Spec, StorageClass
from llmserve.workers.engine.base import EngineInfo
from llmserve.workers.engine.simulated import SimulatedEngine, SimulatedSettings, Timing
from llmserve.workers.engine.simulated_sequence import Limits
from llmserve.workers.engine.wire import API
from llmserve.workers.kv import KvService
from llmserve.workers.metrics import WorkerMetrics
from llmserve.workers.reports import Identity
from llmserve.workers.worker import Worker, WorkerSettings
from tests.bench.mooncake import BLOCK, Ask, TraceLine, asks, compression, read_trace, reusable
from tests.bench.tiered import TieredEngine
from tests.processes import ROOT

TRACE = Path(os.environ.get("LLMSERVE_TRACES", ROOT.parent / "shared" / "traces")) / "mooncake_conversation.jsonl"
PREFILLERS, DECODERS = 4, 2
GPU_PAGES = 1800
"""Of one prefill engine: 0.9 million tokens of the trace, what is left on 8 GPUs of 80 GB for a model of 70 B."""
DRAM_PAGES = 2400
"""1.2 million tokens of the trace: 0.4 TB of that model's pages."""
PAGE_BYTES = 16384
TIMING = Timing(step_s=0.005, prefill_s_per_token=400e-6, decode_s_per_request=20e-6, load_s_per_page=320e-6)
"""A page comes into the engine's memory in a twentieth of the time in which its 16 tokens are computed, and before
that from the folder in the time that this takes."""
LOAD = 0.85
"""Of the prefill engines, were nothing reused: as much as they can have without a queue that grows for ever, less a
margin for the trace's bursts."""
REQUESTS = 2000
SALT = CacheSalts("", {}).worker_salt("t", None)


class Codec(RequestCodec):
    """What the gateway knows of one request."""

    mode = Mode.RESUME
    whole_output = False

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self.prompt_tokens = len(ask.prompt)
        self.max_tokens = ask.max_tokens

    def body(self, request_id: str, delivered: Sequence[int]) -> bytes:
        prompt = [*self._ask.prompt, *delivered]
        sampling = {"max_tokens": self.max_tokens - len(delivered)}
        return msgspec.msgpack.encode([request_id, prompt, None, sampling, None, 0.0, None, None])

    def block_hashes(self, delivered: Sequence[int], block_tokens: int) -> bytes:
        return short_hashes([*self._ask.prompt, *delivered], block_tokens, SALT)


class RoundRobin(Placement):
    """The worker with credit that was taken longest ago."""

    def __init__(self) -> None:
        self._turns: dict[str, int] = {}

    def begin(self, now_s: float) -> None: ...

    def work_tokens(self, entry: Entry, worker: WorkerState) -> int:
        return entry.prompt_tokens

    def cost(self, entry: Entry, worker: WorkerState) -> float:
        return float(self._turns.get(worker.member, 0))

    def granted(self, entry: Entry, worker: WorkerState) -> None:
        self._turns[worker.member] = max(self._turns.values(), default=0) + 1


class Unlimited(SimulatedEngine):
    """Takes all that comes and lets it wait in its own queue, first come first served."""

    async def start(self) -> EngineInfo:
        return replace(await super().start(), step_tokens=10**9)


class Arm(enum.Enum):
    """What is compared."""

    DEALT_OUT = "round robin, no tiers"
    SAME_ROUTER = "same router, round robin, no tiers"
    OURS = "locality, DRAM and folder"


@dataclass
class Outcome:
    """One run."""

    ttft_s: list[float] = field(default_factory=list)
    cached_tokens: int = 0
    prompt_tokens: int = 0
    reused: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    loaded_pages: int = 0
    """From the folder."""
    dropped_pages: int = 0

    @property
    def mean_s(self) -> float:
        return statistics.fmean(self.ttft_s)


class Deployment:
    """Router, workers and a gateway's channel on a bus in memory."""

    def __init__(self, arm: Arm, folder: Path) -> None:
        """``folder``: for the pages of the prefill engines, if they have tiers."""
        self._broker = MemoryBroker()
        self._arm = arm
        settings = RouterSettings(max_wait_s=3600.0)
        rng = random.Random(1)
        placement = None if arm is Arm.OURS else RoundRobin()
        self._router = Router(self._broker.bus("router"), settings, "router", rng=rng, placement=placement)
        self._channel = Channel(
            self._broker.bus("gateway"),
            "gateway",
            API,
            GatewayMetrics(CollectorRegistry()),
            on_arrivals=self._arrived,
            on_failure=self._failed,
            deadline_s=3600.0,
            probe_after_s=3600.0,
        )
        self._metrics = WorkerMetrics(CollectorRegistry())
        disk = StorageClass(name="disk", type="filesystem", path=str(folder))
        self._storage = disk if arm is Arm.OURS else None
        self._kv: KvService | None = None
        self._tiered: list[TieredEngine] = []
        self._workers: list[Worker] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._waiting: dict[str, float] = {}
        self._open: dict[str, asyncio.Future[None]] = {}
        self.outcome = Outcome()

    async def start(self) -> None:
        bus = self._broker.bus("beats")
        await bus.subscribe(bus.subjects.heartbeats, self._channel.block_size.hear)
        await self._channel.start()
        if self._storage is not None:
            models = Models(primary=PrimaryModel(id="simulated"))
            made = Manifest(
                metadata=Metadata(name="bench"), spec=Spec(models=models, storageClasses=(self._storage,))
            )
            self._kv = KvService(made, self._broker.bus("kv"), "kv", CollectorRegistry())
            self._tasks.append(asyncio.create_task(self._kv.run()))
        for number in range(PREFILLERS):
            await self._add(f"p{number}", Role.PREFILL, 512, GPU_PAGES, self._storage)
        for number in range(DECODERS):
            await self._add(f"d{number}", Role.DECODE, 2048, 100_000, None)
        await self._router.start()
        self._tasks.append(asyncio.create_task(self._router.run()))
        self._tasks.append(asyncio.create_task(self._beat()))

    async def _add(self, name: str, role: Role, step_tokens: int, pages: int, storage: StorageClass | None) -> None:
        limits = Limits(
            slots=256, step_tokens=step_tokens, pages=pages, page_tokens=BLOCK, max_model_len=10_000,
            prefix_cache=True, dram_pages=DRAM_PAGES if storage is not None else 0,
        )  # fmt: skip
        settings = SimulatedSettings(limits, TIMING, page_bytes=PAGE_BYTES)
        unlimited = role is Role.PREFILL and self._arm is Arm.DEALT_OUT
        engine = Unlimited(settings) if unlimited else SimulatedEngine(settings)
        if storage is not None:
            engine = TieredEngine(settings, storage, "t")
            self._tiered.append(engine)
        identity = Identity(name, role, host=socket.gethostname())
        worker = Worker(self._broker.bus(name), engine, identity, WorkerSettings(), self._metrics.of(name, role))
        await worker.start()
        self._workers.append(worker)
        self._tasks.append(asyncio.create_task(worker.run()))

    async def _beat(self) -> None:
        """The gateway is alive."""
        mine = self._broker.bus("gateway")
        while True:
            mine.publish(mine.subjects.heartbeats, Heartbeat(member="gateway", role=Role.GATEWAY, host="h", pid=1))
            await asyncio.sleep(0.5)

    async def run(self, requests: Sequence[Ask]) -> Outcome:
        begun_s = time.monotonic()
        streams = []
        for number, ask in enumerate(requests):
            await asyncio.sleep(max(0.0, begun_s + ask.at_s - time.monotonic()))
            streams.append(asyncio.create_task(self._stream(f"r{number}", ask)))
        await asyncio.gather(*streams)
        self.outcome.seconds = time.monotonic() - begun_s
        stats = self._router.core.locality.stats
        self.outcome.loaded_pages = sum(engine.loaded for engine in self._tiered)
        self.outcome.dropped_pages = sum(engine.dropped for engine in self._tiered)
        self.outcome.reused = {tier.value: tokens for tier, tokens in stats.reused_tokens.items() if tokens}
        return self.outcome

    async def _stream(self, name: str, ask: Ask) -> None:
        now_s = time.monotonic()
        self._waiting[name], self._open[name] = now_s, asyncio.get_running_loop().create_future()
        await self._channel.open(name, "t", "interactive", Codec(ask), now_s)
        await self._open[name]
        self.outcome.prompt_tokens += len(ask.prompt)

    def _arrived(self, arrivals: list[Arrival]) -> None:
        now_s = time.monotonic()
        for arrival in arrivals:
            asked_s = self._waiting.pop(arrival.local_id, None)
            if asked_s is not None:
                self.outcome.ttft_s.append(now_s - asked_s)
                self.outcome.cached_tokens += arrival.delta.cached_tokens or 0
            if arrival.reason is not None:
                self._open[arrival.local_id].set_result(None)

    def _failed(self, call: Call, fail: Fail) -> None:
        self._open[call.local_id].set_exception(RuntimeError(f"{fail.code}: {fail.message}"))

    async def stop(self) -> None:
        await self._channel.stop()
        await self._router.stop()
        for worker in self._workers:
            await worker.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def measure(requests: Sequence[Ask], arm: Arm) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="bench-trace-") as folder:
        deployment = Deployment(arm, Path(folder))
        await deployment.start()
        try:
            return await deployment.run(requests)
        finally:
            await deployment.stop()


def show(name: str, outcome: Outcome) -> None:
    ordered = sorted(outcome.ttft_s)
    cached = outcome.cached_tokens / outcome.prompt_tokens
    print(
        f"  {name:<40}{outcome.mean_s * 1e3:>10.1f}{ordered[len(ordered) // 2] * 1e3:>10.1f}"
        f"{ordered[len(ordered) * 99 // 100] * 1e3:>10.1f}{cached:>9.1%}{outcome.seconds:>8.1f}",
        flush=True,
    )


async def compare(lines: Sequence[TraceLine], load: float, arms: Sequence[Arm], *, reuse: bool) -> dict[Arm, float]:
    """Mean TTFT in seconds."""
    faster = compression(lines, PREFILLERS, TIMING.prefill_s_per_token, load)
    requests, name = asks(lines, faster, reuse=reuse), "trace" if reuse else "no reuse"
    print(
        f"{name}, load {load:g}: {len(requests)} requests, a cache could reuse {reusable(requests):.1%} of the tokens"
    )
    means_s = {}
    for arm in arms:
        outcome = await measure(requests, arm)
        show(arm.value, outcome)
        means_s[arm] = outcome.mean_s
        if arm is Arm.OURS:
            print(f"    read from the folder: {outcome.loaded_pages} pages; ", end="")
            print(f"not written: {outcome.dropped_pages}; reused: {outcome.reused}")
    return means_s


def figures(trace: Path = TRACE, requests: int = REQUESTS, load: float = LOAD) -> dict[str, float]:
    """All ratios, of the first so many requests; without reuse of a third of them."""
    lines = read_trace(trace, requests)
    print(f"{'TTFT':<42}{'mean ms':>10}{'p50 ms':>10}{'p99 ms':>10}{'cached':>9}{'s':>8}")
    means_s = asyncio.run(compare(lines, load, list(Arm), reuse=True))
    fresh_s = asyncio.run(compare(lines[: requests // 3], load, [Arm.SAME_ROUTER, Arm.OURS], reuse=False))
    return {
        "trace_ttft_ratio": means_s[Arm.OURS] / means_s[Arm.DEALT_OUT],
        "trace_ttft_ratio_same_router": means_s[Arm.OURS] / means_s[Arm.SAME_ROUTER],
        "no_reuse_ttft_ratio": fresh_s[Arm.OURS] / fresh_s[Arm.SAME_ROUTER],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trace", type=Path, default=TRACE, help="also by the folder in $LLMSERVE_TRACES")
    parser.add_argument("--requests", type=int, default=REQUESTS, help="the first so many of the trace")
    parser.add_argument("--load", type=float, default=LOAD, help="of the prefill engines, if nothing were reused")
    options = parser.parse_args()
    for name, value in figures(options.trace, options.requests, options.load).items():
        print(f"{name:<24}{value:>8.3f}")


if __name__ == "__main__":
    main()
