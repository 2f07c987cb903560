"""Time to the first token on a trace of real conversations, by where requests are placed.

Mooncake's conversation trace (arrival times, lengths, and the blocks of 512 tokens that prompts share), made smaller:
a block is one page of 16 tokens, and time is compressed to the load that ``--load`` says. The router, the gateway's
channel and the workers are the real ones, over the bus in memory; the engines are simulated, with the paging and the
prefix cache of vLLM and a tier in DRAM, and take the time that ``TIMING`` says. Compared are placement by locality
with the tier, and round robin among the workers that have credit without it; the same with prompts that share
nothing.
``make bench-kv`` writes ``trace_ttft_ratio`` and ``no_reuse_ttft_ratio``; run alone it only prints.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
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
from llmserve.workers.engine.simulated import SimulatedEngine, SimulatedSettings, Timing
from llmserve.workers.engine.simulated_sequence import Limits
from llmserve.workers.engine.wire import API
from llmserve.workers.metrics import WorkerMetrics
from llmserve.workers.reports import Identity
from llmserve.workers.worker import Worker, WorkerSettings
from tests.processes import ROOT

TRACE = Path(os.environ.get("LLMSERVE_TRACES", ROOT.parent / "shared" / "traces")) / "mooncake_conversation.jsonl"
BLOCK = 16
SHRINK = 512 // BLOCK
PREFILLERS, DECODERS = 4, 2
GPU_PAGES = 1800
"""Of one prefill engine: 0.9 million tokens of the trace, what is left on 8 GPUs of 80 GB for a model of 70 B."""
DRAM_PAGES = 6000
"""3 million tokens of the trace: 1 TB of that model's pages."""
TIMING = Timing(step_s=0.005, prefill_s_per_token=200e-6, decode_s_per_request=20e-6, load_s_per_page=160e-6)
"""A page loads in a twentieth of the time in which its 16 tokens are computed."""
SALT = CacheSalts("", {}).worker_salt("t", None)


class TraceLine(msgspec.Struct):
    timestamp: int
    """Milliseconds."""
    input_length: int
    output_length: int
    hash_ids: list[int]


@dataclass(frozen=True, slots=True)
class Ask:
    """One request of the trace, made smaller."""

    at_s: float
    prompt: list[int]
    max_tokens: int


def block(number: int) -> list[int]:
    """The tokens of a block: no two blocks have the same."""
    return [
        100 + number % 30_000,
        100 + number // 30_000,
        *(100 + (number * 31 + k) % 30_000 for k in range(BLOCK - 2)),
    ]


def asks(lines: Sequence[TraceLine], compression: float, *, reuse: bool) -> list[Ask]:
    """``reuse`` False: every block is another."""
    made, fresh = [], 10_000_000
    for line in lines:
        length = max(1, round(line.input_length / SHRINK))
        numbers = line.hash_ids
        if not reuse:
            numbers = list(range(fresh, fresh + len(numbers)))
            fresh += len(numbers)
        prompt = [token for number in numbers for token in block(number)][:length]
        output = max(1, round(line.output_length / SHRINK))
        made.append(Ask((line.timestamp - lines[0].timestamp) / 1e3 / compression, prompt, output))
    return made


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


@dataclass
class Outcome:
    """One run."""

    ttft_s: list[float] = field(default_factory=list)
    cached_tokens: int = 0
    prompt_tokens: int = 0
    reused: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def mean_s(self) -> float:
        return statistics.fmean(self.ttft_s)


class Deployment:
    """Router, workers and a gateway's channel on a bus in memory."""

    def __init__(self, placement: Placement | None, dram_pages: int) -> None:
        self._broker = MemoryBroker()
        settings = RouterSettings(max_wait_s=3600.0)
        rng = random.Random(1)
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
        self._dram_pages = dram_pages
        self._workers: list[Worker] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._waiting: dict[str, float] = {}
        self._open: dict[str, asyncio.Future[None]] = {}
        self.outcome = Outcome()

    async def start(self) -> None:
        bus = self._broker.bus("beats")
        await bus.subscribe(bus.subjects.heartbeats, self._channel.block_size.hear)
        await self._channel.start()
        for number in range(PREFILLERS):
            await self._add(f"p{number}", Role.PREFILL, 512, GPU_PAGES, self._dram_pages)
        for number in range(DECODERS):
            await self._add(f"d{number}", Role.DECODE, 2048, 100_000, 0)
        await self._router.start()
        self._tasks.append(asyncio.create_task(self._router.run()))
        self._tasks.append(asyncio.create_task(self._beat()))

    async def _add(self, name: str, role: Role, step_tokens: int, pages: int, dram_pages: int) -> None:
        limits = Limits(
            slots=256, step_tokens=step_tokens, pages=pages, page_tokens=BLOCK, max_model_len=10_000,
            prefix_cache=True, dram_pages=dram_pages,
        )  # fmt: skip
        engine = SimulatedEngine(SimulatedSettings(limits, TIMING, page_bytes=1000))
        identity = Identity(name, role, host="h")
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


async def measure(requests: Sequence[Ask], placement: Placement | None, dram_pages: int) -> Outcome:
    deployment = Deployment(placement, dram_pages)
    await deployment.start()
    try:
        return await deployment.run(requests)
    finally:
        await deployment.stop()


def read_trace(path: Path, count: int) -> list[TraceLine]:
    decoder = msgspec.json.Decoder(TraceLine)
    with path.open("rb") as file:
        return [decoder.decode(line) for line, _ in zip(file, range(count), strict=False)]


def compression(lines: Sequence[TraceLine], load: float) -> float:
    """Of time, so that computing every prompt whole would take ``load`` of the prefill engines' time."""
    tokens = sum(max(1, round(line.input_length / SHRINK)) for line in lines)
    busy_s = tokens * TIMING.prefill_s_per_token / PREFILLERS
    return (lines[-1].timestamp - lines[0].timestamp) / 1e3 / (busy_s / load)


def show(name: str, outcome: Outcome) -> None:
    ordered = sorted(outcome.ttft_s)
    cached = outcome.cached_tokens / outcome.prompt_tokens
    print(
        f"{name:<42}{outcome.mean_s * 1e3:>10.1f}{ordered[len(ordered) // 2] * 1e3:>10.1f}"
        f"{ordered[len(ordered) * 99 // 100] * 1e3:>10.1f}{cached:>9.1%}{outcome.seconds:>8.1f}"
    )


async def compare(lines: Sequence[TraceLine], load: float, *, reuse: bool) -> float:
    requests = asks(lines, compression(lines, load), reuse=reuse)
    robin = await measure(requests, RoundRobin(), 0)
    show(f"{'trace' if reuse else 'no reuse'}, load {load:g}: round robin", robin)
    local = await measure(requests, None, DRAM_PAGES)
    show(f"{'trace' if reuse else 'no reuse'}, load {load:g}: locality, DRAM tier", local)
    return local.mean_s / robin.mean_s


def figures(
    trace: Path = TRACE, requests: int = 2000, load: float = 1.0, no_reuse_load: float = 0.85
) -> dict[str, float]:
    """Both ratios; ``load``: of the prefill engines, if nothing were reused."""
    lines = read_trace(trace, requests)
    print(f"{'TTFT':<42}{'mean ms':>10}{'p50 ms':>10}{'p99 ms':>10}{'cached':>9}{'s':>8}")
    return {
        "trace_ttft_ratio": asyncio.run(compare(lines, load, reuse=True)),
        "no_reuse_ttft_ratio": asyncio.run(compare(lines, no_reuse_load, reuse=False)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trace", type=Path, default=TRACE, help="also by the folder in $LLMSERVE_TRACES")
    parser.add_argument("--requests", type=int, default=2000, help="the first so many of the trace")
    parser.add_argument("--load", type=float, default=1.0, help="of the prefill engines, if nothing were reused")
    parser.add_argument("--no-reuse-load", type=float, default=0.85)
    options = parser.parse_args()
    for name, value in figures(options.trace, options.requests, options.load, options.no_reuse_load).items():
        print(f"{name:<24}{value:>8.3f}")


if __name__ == "__main__":
    main()
