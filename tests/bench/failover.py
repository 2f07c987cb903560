"""What a dead leader costs: ``kill -9`` of the leading router under load, on simulated engines in separate processes.

Adds to ``build/bench/flow.json``: ``failover_s``, the longest that workers saw no grant around a kill (median of the
kills), ``failover_max_s``, ``steady_gap_s``, the longest in the same time without a kill, and ``lost``, accepted
requests that did not end with exactly their tokens, exactly once.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from llmserve.bus.messages import AnyMessage, Grant
from tests.faults.load import prompt
from tests.faults.observer import Observer
from tests.processes import ROOT
from tests.services import Services
from tests.sim_gateway import Answer, SimGateway
from tests.workers.world import expected

KILLS = 7
RATE = 150.0
"""Requests a second."""
TOKENS = 8
AROUND_S = 1.5
"""Before and after a kill."""


@dataclass
class Grants:
    """When workers were granted something."""

    at_s: list[float] = field(default_factory=list)

    def hear(self, message: AnyMessage) -> None:
        if isinstance(message, Grant):
            self.at_s.append(time.monotonic())

    def longest_gap_s(self, since_s: float, until_s: float) -> float:
        times = [since_s, *(at for at in self.at_s if since_s <= at <= until_s), until_s]
        return max(later - earlier for earlier, later in itertools.pairwise(times))


async def load(gateway: SimGateway, stopping: asyncio.Event) -> None:
    """Requests at an even rate, whatever becomes of those before."""
    sending: set[asyncio.Task[Answer]] = set()
    number, begun_s = 0, time.monotonic()
    while not stopping.is_set():
        task = asyncio.create_task(gateway.send(prompt(number, 40), TOKENS))
        sending.add(task)
        task.add_done_callback(sending.discard)
        number += 1
        await asyncio.sleep(max(0.0, begun_s + number / RATE - time.monotonic()))
    await asyncio.gather(*sending)


async def kills(services: Services, observer: Observer, grants: Grants) -> tuple[list[float], list[float]]:
    """(gaps around kills, gaps without one), in seconds."""
    around, steady = [], []
    for _ in range(KILLS):
        start_s = time.monotonic()
        await asyncio.sleep(2 * AROUND_S)
        steady.append(grants.longest_gap_s(start_s, time.monotonic()))
        leader = await observer.leader()
        start_s = time.monotonic()
        await asyncio.sleep(AROUND_S)
        services.processes[leader].kill()
        await asyncio.sleep(AROUND_S)
        around.append(grants.longest_gap_s(start_s, time.monotonic()))
        services.start(leader, "router")
        await asyncio.sleep(2.5)  # until it stands by
    return around, steady


async def measure(services: Services) -> dict[str, float]:
    observer = await Observer.open(services)
    gateway, grants, stopping = SimGateway(observer.bus), Grants(), asyncio.Event()
    await observer.bus.subscribe(f"{observer.bus.subjects.root}.work.*", grants.hear)
    await gateway.open()
    loading = asyncio.create_task(load(gateway, stopping))
    await asyncio.sleep(2.0)
    around, steady = await kills(services, observer, grants)
    stopping.set()
    await loading
    async with asyncio.timeout(30):
        await asyncio.gather(*(answer.done.wait() for answer in gateway.answers))
    await observer.settled(15)
    lost = sum(answer.tokens != expected(answer.prompt, TOKENS) for answer in gateway.answers)
    results, recorded = await observer.results()
    lost += abs(len(results) - len(gateway.answers)) + recorded - len(results)
    await gateway.close()
    await observer.close()
    print(f"\n{KILLS} kills of the leading router, {RATE:g} requests/s, {len(gateway.answers)} requests")
    print("longest time without a grant, s: around each kill " + " ".join(f"{gap:.3f}" for gap in around))
    print(" " * 33 + "without a kill " + " ".join(f"{gap:.3f}" for gap in steady))
    return {
        "failover_s": statistics.median(around),
        "failover_max_s": max(around),
        "steady_gap_s": statistics.median(steady),
        "lost": float(lost),
    }


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="llmserve-bench-") as folder:
        services = Services(Path(folder), "sim.yaml", {"deployment.replicas": {"prefill": 0, "decode": 2}})
        services.commands["both"] = services.commands["decode"].replace("--role decode", "--role both")
        try:
            services.start_all(["router"])
            services.start("router-2", "router")
            for name in ("both-1", "both-2"):
                services.start(name, "both").wait_for_line("ready after", 60)
            figures = asyncio.run(measure(services))
        finally:
            services.end()
    target = ROOT / "build" / "bench" / "flow.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(target.read_text()) if target.exists() else {}
    known |= {key: round(value, 4) for key, value in figures.items()}
    target.write_text(json.dumps(known, indent=1) + "\n")
    print()
    for key, value in figures.items():
        print(f"{key:<36}{value:>10.3f}")


if __name__ == "__main__":
    main()
