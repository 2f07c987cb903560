"""The real router and bus: shares of backlogged tenants, and how long a request takes from the gateway to a worker.

Three processes: a nats-server, the router, and this one, which plays gateway and workers. How long the same way takes
through the same server when nothing is decided on it is the floor: ``floor.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import uvloop

from llmserve.bus.collector import rest_collector
from llmserve.bus.server import EmbeddedServer
from tests.bench.flow.figures import percentile
from tests.bench.flow.floor import floor
from tests.bench.flow.pool import WEIGHTS, Job, pool

SIZES = {"a": (200, 100), "b": (400, 40), "c": (100, 120), "d": (300, 50)}
"""Mean prompt and output tokens; each from half to one and a half of it."""
SHARE_SLOTS = (4, 4)
"""Workers, slots of each."""
COST_PER_S = 9000.0
"""Of one slot: about 300 requests/s in all."""
WARM_S, SHARE_S = 4.0, 24.0
OUTSTANDING = 48
"""Requests that each tenant keeps on the stream."""
RATE, RATE_S = 1000.0, 8.0


def draw(rng: random.Random, tenant: str) -> Job:
    prompt_tokens, output_tokens = SIZES[tenant]
    return Job(tenant, round(prompt_tokens * rng.uniform(0.5, 1.5)), round(output_tokens * rng.uniform(0.5, 1.5)))


async def share_error(server: EmbeddedServer) -> tuple[float, float]:
    """(largest difference from a tenant's share, in parts of it; requests/s), all tenants backlogged all the time."""
    rng = random.Random(1)
    async with pool(server, *SHARE_SLOTS, 1 / COST_PER_S) as members:
        for _ in range(OUTSTANDING):
            for tenant in WEIGHTS:
                await members.send(draw(rng, tenant))
        begin_s = time.monotonic() + WARM_S
        end_s = begin_s + SHARE_S
        while time.monotonic() < end_s:
            job = await members.ended.get()
            members.keep(members.send(draw(rng, job.tenant)))
        served = dict.fromkeys(WEIGHTS, 0.0)
        number = 0
        for job in members.jobs.values():
            if job.got_s < end_s and job.ended_s > begin_s:
                number += 1
                # Of what still runs the end is not known yet.
                ended_s = job.ended_s if job.ended_s < math.inf else job.got_s + job.cost / COST_PER_S
                part_s = min(ended_s, end_s) - max(job.got_s, begin_s)
                served[job.tenant] += job.cost * max(0.0, part_s) / (ended_s - job.got_s)
    shares = {tenant: sum(served.values()) * weight / sum(WEIGHTS.values()) for tenant, weight in WEIGHTS.items()}
    return max(abs(served[tenant] / shares[tenant] - 1) for tenant in WEIGHTS), number / SHARE_S


async def dispatch(server: EmbeddedServer) -> dict[str, float]:
    """From the gateway's publish to the worker's hands, at ``RATE`` requests a second and free slots; for comparison
    to the server's acknowledgement, and over the same hops with nothing decided."""
    rng = random.Random(2)
    async with pool(server, 4, 64, 1e-5) as members:
        rest_collector(10_000)  # as gateways and workers do
        cpu_s, begun_s = members.router_cpu_s(), time.monotonic()
        for number in range(int(RATE * RATE_S)):
            await asyncio.sleep(max(0.0, begun_s + number / RATE - time.monotonic()))
            members.keep(members.send(Job(rng.choice("abcd"), 64, 16)))
        async with asyncio.timeout(30):
            for _ in range(int(RATE * RATE_S)):
                await members.ended.get()
        took_s, cpu_s = time.monotonic() - begun_s, members.router_cpu_s() - cpu_s
    jobs = [job for job in members.jobs.values() if job.sent_s > begun_s + 1.0]
    times_s = {
        "dispatch": [job.got_s - job.sent_s for job in jobs],
        "stored": [job.stored_s - job.sent_s for job in jobs],
        "floor": await floor(server, RATE, RATE_S),
    }
    figures = {
        f"{name}_p{percent}_ms": 1000 * percentile(values, percent / 100)
        for name, values in times_s.items()
        for percent in (50, 99)
    }
    figures["dispatch_over_floor"] = figures["dispatch_p50_ms"] / figures["floor_p50_ms"]
    figures["router_us_per_request"] = 1e6 * cpu_s / (RATE * RATE_S)
    print(f"\npublish to worker: {RATE:g} requests/s sent, {RATE * RATE_S / took_s:.0f}/s ended")
    return figures


def measure_share() -> dict[str, float]:
    """Figures for ``flow.json``."""
    with fresh_server() as server:
        error, rate = uvloop.run(share_error(server))
    print(f"\nfour backlogged tenants over the real bus: share error {error:.3%}, {rate:.0f} requests/s")
    return {"share_error": error}


def measure_dispatch(rounds: int) -> dict[str, float]:
    """The same; medians over ``rounds``."""
    measured: list[dict[str, float]] = []
    for _ in range(rounds):
        with fresh_server() as server:
            measured.append(uvloop.run(dispatch(server)))
        print("  ".join(f"{name} {value:.4g}" for name, value in measured[-1].items()), flush=True)
    return {name: statistics.median(figures[name] for figures in measured) for name in measured[0]}


@contextlib.contextmanager
def fresh_server() -> Iterator[EmbeddedServer]:
    with tempfile.TemporaryDirectory(prefix="llmserve-bench-") as folder:
        server = EmbeddedServer(Path(folder))
        server.start()
        try:
            yield server
        finally:
            server.stop()
