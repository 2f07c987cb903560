"""``make bench-gateway``: what the gateway costs, beside vLLM's own front end and a bare ASGI app.

Every server is a process of its own whose CPU time is read from outside; engines, router, nats-server and load
generator are other processes. 64 open streams, a token each 20 ms. Writes ``build/bench/gateway.json``.

``us_per_token``: CPU time per streamed token while 64 streams are open and none begins or ends.
``us_per_request``: what a request of 64 tokens costs besides its tokens; 64 clients that ask again and again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import uvloop

from tests.bench.path import SERVED, frontend
from tests.bench.wire import Answer, Wire, chat_request, connect, percentile
from tests.processes import BIN, ROOT, Process, Stack, answers, free_port, manifest_with, running, wait_for

STREAMS = 64
ANSWER_TOKENS = 64
STEP_MS = 20.0
MANY_STREAMS = 256
"""As many as the simulated engine decodes at once."""
IDLE_S = 10.0
PROMPT = (
    "Request {}. Summarise the following notes for a reader who has little time: the meeting began late, the"
    " budget was not approved, two people volunteered to write the report, and the next date is open."
    " Name who is to do what."
)
MANIFEST: dict[str, object] = {
    "models.primary.served_name": SERVED,
    "engine.simulated.step_ms": STEP_MS,
    "engine.simulated.prefill_us_per_token": 0,
    "engine.simulated.decode_us_per_request": 0,
    "scheduling.policies.queue_max_len": 20_000,
}


@dataclass(frozen=True)
class Server:
    """One front end under test."""

    url: str
    process: psutil.Process

    def cpu_s(self) -> float:
        # The process's own clock, as clock_getcpuclockid(3) finds it: /proc counts in hundredths of a second.
        return time.clock_gettime((~self.process.pid << 3) | 2)

    def rss_mb(self) -> float:
        return float(self.process.memory_info().rss / 2**20)


@dataclass
class Cost:
    """Of one server in one round."""

    us_per_token: float
    us_per_request: float
    us_per_token_all: float
    """All CPU time over all tokens."""
    gaps_s: list[float]
    nats_us_per_token: float = 0.0


async def ask_forever(wire: Wire, request: Callable[[], bytes], until_s: float, answers: list[Answer]) -> None:
    while time.perf_counter() < until_s:
        answer = await wire.ask(request())
        if answer.status != 200 or not answer.done:
            raise SystemExit(f"an answer of status {answer.status} ended after {answer.events} events")
        answers.append(answer)


async def requests_cost(server: Server, seconds: float, numbers: Iterator[int]) -> tuple[float, int]:
    """(CPU seconds, requests) of 64 clients that ask again and again, which began spread over an answer's time."""
    wires = await connect(server.url, STREAMS)
    answers: list[Answer] = []

    def request() -> bytes:
        return chat_request(server.url, SERVED, PROMPT.format(next(numbers)), ANSWER_TOKENS)

    async def client(index: int, until_s: float) -> None:
        await asyncio.sleep(index / STREAMS * ANSWER_TOKENS * STEP_MS / 1000)
        await ask_forever(wires[index], request, until_s, answers)

    before_s = server.cpu_s()
    until_s = time.perf_counter() + seconds
    await asyncio.gather(*(client(index, until_s) for index in range(STREAMS)))
    spent_s = server.cpu_s() - before_s
    for wire in wires:
        wire.close()
    return spent_s, len(answers)


async def tokens_cost(
    server: Server, seconds: float, numbers: Iterator[int], streams: int
) -> tuple[float, list[float]]:
    """(CPU seconds per token, gaps between tokens) while ``streams`` are open."""
    wires = await connect(server.url, streams)
    output = min(1900, int((seconds + 4) / STEP_MS * 1000))
    asking = [
        asyncio.create_task(wire.ask(chat_request(server.url, SERVED, PROMPT.format(next(numbers)), output)))
        for wire in wires
    ]
    for wire in wires:
        await wire.begun.wait()
    await asyncio.sleep(0.5)
    running_answers = [wire.running for wire in wires]
    before_s, events_before = server.cpu_s(), sum(answer.events for answer in running_answers)
    began = time.perf_counter()
    await asyncio.sleep(seconds)
    spent_s, events = server.cpu_s() - before_s, sum(answer.events for answer in running_answers) - events_before
    ended = time.perf_counter()
    for wire in wires:
        wire.close()
    await asyncio.gather(*asking)
    gaps = [
        after - before
        for answer in running_answers
        for before, after in zip(answer.times_s, answer.times_s[1:], strict=False)
        if began < before and after < ended
    ]
    return spent_s / events, gaps


async def measure(server: Server, seconds: float, numbers: Iterator[int], nats: Callable[[], float]) -> Cost:
    nats_before_s = nats()
    per_token_s, gaps_s = await tokens_cost(server, seconds, numbers, STREAMS)
    nats_s = nats() - nats_before_s
    await asyncio.sleep(0.5)
    spent_s, requests = await requests_cost(server, seconds, numbers)
    await asyncio.sleep(0.5)
    per_request_s = spent_s / requests
    return Cost(
        us_per_token=per_token_s * 1e6,
        us_per_request=(per_request_s - per_token_s * ANSWER_TOKENS) * 1e6,
        us_per_token_all=per_request_s / ANSWER_TOKENS * 1e6,
        gaps_s=gaps_s,
        nats_us_per_token=nats_s / max(1, len(gaps_s)) * 1e6,
    )


@dataclass
class Idle:
    """Streams that were opened, and get no token."""

    held: int
    rss_mb: float
    cpu_share: float


async def idle_streams(server: Server, count: int, numbers: Iterator[int]) -> Idle:
    """Open ``count`` streams, wait, and see how many are still open and what they cost."""
    wires: list[Wire] = []
    asking = []
    while len(wires) < count:
        # The gateway drops connections that send nothing.
        fresh = await connect(server.url, min(100, count - len(wires)))
        for wire in fresh:
            request = chat_request(server.url, SERVED, PROMPT.format(next(numbers)), ANSWER_TOKENS)
            asking.append(asyncio.create_task(wire.ask(request)))
        wires += fresh
        await asyncio.sleep(0.25)
    # Until the gateway has taken them all.
    before_s = -1.0
    while server.cpu_s() - before_s > 0.2:
        before_s = server.cpu_s()
        await asyncio.sleep(1.0)
    before_s = server.cpu_s()
    await asyncio.sleep(IDLE_S)
    spent_s = server.cpu_s() - before_s
    held = sum(not task.done() for task in asking)
    result = Idle(held, server.rss_mb(), spent_s / IDLE_S)
    for wire in wires:
        wire.close()
    await asyncio.gather(*asking)
    return result


@contextmanager
def stopped(process: psutil.Process) -> Iterator[None]:
    """Router and workers stand still; nats-server, another process, goes on."""
    process.suspend()
    try:
        yield
    finally:
        process.resume()


@contextmanager
def gateway(folder: Path) -> Iterator[tuple[Server, Callable[[], float], psutil.Process]]:
    """``llmserve-gateway`` beside a stack that has the router, the simulated workers and nats-server."""
    manifest = manifest_with("sim.yaml", folder, MANIFEST)
    stack = Stack(manifest, folder / "stack.log")
    with running(stack):
        stack.ready()
        port = free_port()
        command = [str(BIN / "llmserve-gateway"), "--manifest", str(manifest), "--port", str(port)]
        process = Process("gateway", [*command, "--metrics-port", str(free_port())], folder / "gateway.log")
        with running(process):
            url = f"http://127.0.0.1:{port}"
            wait_for(lambda: answers(f"{url}/health/ready"), 120, f"the gateway:\n{process.output[-2000:]}")
            (nats,) = [child for child in stack.family() if "nats-server" in child.name()]

            def nats_s() -> float:
                times = nats.cpu_times()
                return times.user + times.system

            yield Server(url, psutil.Process(process.pid)), nats_s, psutil.Process(stack.pid)


@contextmanager
def other(kind: str, folder: Path) -> Iterator[Server]:
    with frontend(kind, folder, MANIFEST) as (url, pid):
        yield Server(url, psutil.Process(pid))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["gateway", "vllm", "floor"], action="append")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--idle", type=int, default=5000, help="idle streams to hold; 0: none")
    parser.add_argument("--profile", metavar="FILE", help="py-spy's record of the gateway, for example profile.svg")
    options = parser.parse_args()
    # So that nothing stays behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    chosen = options.only or ["gateway", "vllm", "floor"]
    costs: dict[str, list[Cost]] = {name: [] for name in chosen}
    numbers = iter(range(10**9))
    with tempfile.TemporaryDirectory(prefix="llmserve-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        servers: dict[str, Server] = {}
        nats: Callable[[], float] = float
        if "gateway" in chosen:
            servers["gateway"], nats, workers = stack.enter_context(gateway(folder))
        for kind in ("vllm", "floor"):
            if kind in chosen:
                servers[kind] = stack.enter_context(other(kind, folder))
        uvloop.run(rounds(servers, options.rounds, options.seconds, numbers, costs, nats, options.profile))
        memory = {kind: server.rss_mb() for kind, server in servers.items()}
        more = {}
        for kind in [kind for kind in ("gateway", "floor") if kind in servers]:
            _, gaps_s = uvloop.run(tokens_cost(servers[kind], options.seconds, numbers, MANY_STREAMS))
            more[f"gap_p99_ms_{MANY_STREAMS}_{kind}"] = percentile(gaps_s, 0.99) * 1e3
        if options.idle and "gateway" in servers:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(20_000, hard_files()), hard_files()))
            with stopped(workers):
                idle = uvloop.run(idle_streams(servers["gateway"], options.idle, numbers))
            more |= {"idle_streams": idle.held, "idle_rss_mb": idle.rss_mb, "idle_cpu_share": idle.cpu_share}
    report(costs, memory, more)


def hard_files() -> int:
    """How many files this process may be allowed to have open."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[1]


async def rounds(
    servers: dict[str, Server],
    count: int,
    seconds: float,
    numbers: Iterator[int],
    costs: dict[str, list[Cost]],
    nats: Callable[[], float],
    profile: str | None,
) -> None:
    """Every server in turn, after one short warm-up."""
    for server in servers.values():
        await measure(server, 2.0, numbers, float)
    recorder = None
    if profile:
        pid = str(servers["gateway"].process.pid)
        command = ["py-spy", "record", "-p", pid, "-r", "500", "-d", str(int(count * seconds * 2)), "-o", profile]
        recorder = await asyncio.create_subprocess_exec(*command, "-f", "raw")
    for _ in range(count):
        for kind, server in servers.items():
            costs[kind].append(await measure(server, seconds, numbers, nats if kind == "gateway" else float))
    if recorder is not None:
        await recorder.wait()


def report(costs: dict[str, list[Cost]], memory: dict[str, float], more: dict[str, float]) -> None:
    names = {
        "gateway": "llmserve-gateway",
        "vllm": "vLLM's own front end, no bus",
        "floor": "bare ASGI app",
    }
    figures: dict[str, float] = {}
    columns = f"{'us/token':>10}{'us/request':>12}{'all us/token':>14}{'gap p99 ms':>12}"
    print(f"\n{'64 streams, a token each 20 ms':<32}{columns}")
    for kind, rows in costs.items():
        suffix = "" if kind == "gateway" else f"_{kind}"
        per_token = statistics.median(cost.us_per_token for cost in rows)
        per_request = statistics.median(cost.us_per_request for cost in rows)
        all_in = statistics.median(cost.us_per_token_all for cost in rows)
        p99_s = percentile([gap for cost in rows for gap in cost.gaps_s], 0.99)
        print(f"{names[kind]:<32}{per_token:>10.1f}{per_request:>12.0f}{all_in:>14.1f}{p99_s * 1e3:>12.2f}")
        figures |= {
            f"us_per_token{suffix}": per_token,
            f"us_per_request{suffix}": per_request,
            f"us_per_token_all{suffix}": all_in,
            f"rss_mb{suffix}": memory[kind],
            f"gap_p99_ms{suffix}": p99_s * 1e3,
        }
        if kind == "gateway":
            figures["nats_us_per_token"] = statistics.median(cost.nats_us_per_token for cost in rows)
    if {"gap_p99_ms", "gap_p99_ms_floor"} <= figures.keys():
        figures["jitter_added_p99_ms"] = figures["gap_p99_ms"] - figures["gap_p99_ms_floor"]
    figures |= more
    target = ROOT / "build" / "bench" / "gateway.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({key: round(value, 3) for key, value in figures.items()}, indent=1) + "\n")
    print()
    for key, value in figures.items():
        print(f"{key:<28}{value:>10.2f}")


if __name__ == "__main__":
    main()
