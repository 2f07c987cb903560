"""A random component is killed every few seconds under load; then everything is accounted for.

25 s unless ``LLMSERVE_CHAOS_S`` says otherwise; ``LLMSERVE_CHAOS_SEED`` repeats a run.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from dataclasses import dataclass, field

import aiohttp
import psutil
import pytest

from llmserve.bus.base import BusError
from tests.bench.load import Stream, prompt_bodies, stream
from tests.faults.load import prompt, require_exact
from tests.faults.observer import Observer
from tests.services import Services
from tests.sim_gateway import SimGateway

pytestmark = pytest.mark.faults

SECONDS = float(os.environ.get("LLMSERVE_CHAOS_S", "25"))
SEED = int(os.environ.get("LLMSERVE_CHAOS_SEED", str(random.randrange(10**6))))
KINDS = ("gateway", "leader", "prefill", "decode", "nats")
HTTP_CLIENTS = 8
BODIES = 24


@dataclass
class Chaos:
    """Kills and restarts; knows which gateways died, since their clients may see it."""

    services: Services
    observer: Observer
    rng: random.Random
    kills: Counter[str] = field(default_factory=Counter)
    dead_gateways: set[str] = field(default_factory=set)
    gateway_died_s: list[float] = field(default_factory=list)

    async def run(self, seconds: float) -> None:
        end_s, bag = time.monotonic() + seconds, list[str]()
        while time.monotonic() < end_s:
            await asyncio.sleep(self.rng.uniform(1.0, 3.0))
            if not bag:
                bag = self.rng.sample(KINDS, len(KINDS))
            await self.kill(bag.pop())

    async def kill(self, kind: str) -> None:
        name = kind
        if kind == "leader":
            name = await self.observer.leader()
        elif kind in ("prefill", "decode"):
            name = self.rng.choice([kind, f"{kind}-2"])
        process = self.services.processes[name]
        if kind == "gateway":
            if process.pid not in {beat.pid for beat in self.observer.beats.values()}:
                return  # still starting
            self.dead_gateways.add(await self.observer.member(process))
            self.gateway_died_s.append(time.monotonic())
        process.kill()
        self.kills[kind] += 1
        await asyncio.sleep(self.rng.uniform(0.1, 1.0))
        service = {"leader": "router"}.get(kind, kind)
        self.services.start(name, None if name == service else service)


@dataclass
class Heard:
    """What one client of the HTTP gateway got."""

    body: int
    began_s: float
    ended_s: float
    stream: Stream


async def http_client(services: Services, bodies: list[dict[str, object]], stop_s: float, number: int) -> list[Heard]:
    heard: list[Heard] = []
    index = number
    async with aiohttp.ClientSession(headers=services.headers) as session:
        while time.monotonic() < stop_s:
            began_s = time.monotonic()
            got = await stream(session, services.url, bodies[index % BODIES])
            if got.chunks == 0 and got.error and "Connect" in got.error:
                await asyncio.sleep(0.2)  # there is no gateway at the moment
                continue
            heard.append(Heard(index % BODIES, began_s, time.monotonic(), got))
            index += HTTP_CLIENTS
    return heard


async def bus_client(gateway: SimGateway, stop_s: float, rng: random.Random) -> int:
    """Asks all the time; returns how many requests were not accepted."""
    refused, number = 0, 0
    sent: list[asyncio.Task[object]] = []
    while time.monotonic() < stop_s:
        number += 1
        sent.append(asyncio.create_task(gateway.send(prompt(number, rng.randint(20, 400)), rng.randint(5, 150))))
        await asyncio.sleep(rng.expovariate(20.0))
    for end in await asyncio.gather(*sent, return_exceptions=True):
        if isinstance(end, BusError):
            refused += 1
        elif isinstance(end, BaseException):
            raise end
    return refused


async def connections(observer: Observer) -> Counter[tuple[str, int]]:
    return await asyncio.to_thread(observer.connections)


async def test_after_any_deaths_every_request_has_ended_once_and_nothing_is_left(
    services: Services, observer: Observer, gateway: SimGateway
) -> None:
    print(f"LLMSERVE_CHAOS_SEED={SEED}")
    rng = random.Random(SEED)
    bodies = prompt_bodies(services.model, BODIES, 200, 150, seed=41)
    connections_before = await connections(observer)
    consumers_before = await asyncio.to_thread(observer.consumers)
    children_before = len(psutil.Process().children(recursive=True))

    chaos = Chaos(services, observer, rng)
    stop_s = time.monotonic() + SECONDS
    clients = [asyncio.create_task(http_client(services, bodies, stop_s, k)) for k in range(HTTP_CLIENTS)]
    asking = asyncio.create_task(bus_client(gateway, stop_s, random.Random(SEED + 1)))
    await chaos.run(SECONDS)
    await asyncio.to_thread(services.ready, 60)
    heard = [one for client in clients for one in await client]
    refused = await asking
    async with asyncio.timeout(60):
        await asyncio.gather(*(answer.done.wait() for answer in gateway.answers))
    await observer.settled(30)
    print(f"kills {dict(chaos.kills)}, {len(gateway.answers)} bus and {len(heard)} HTTP requests, {refused} refused")

    # Every request of the gateway that lived on ended with exactly its tokens.
    require_exact(gateway.answers)
    assert refused == 0
    # Of the others', each that did not lose its gateway.
    calm = await asyncio.gather(*(_calm(services, body) for body in bodies))
    for one in heard:
        if any(one.began_s <= died_s <= one.ended_s for died_s in chaos.gateway_died_s):
            continue
        assert not one.stream.error
        assert one.stream.text == calm[one.body]
    # Each has one record, unless nobody waited for it any more.
    results, recorded = await observer.results()
    assert recorded == len(results)
    for item in observer.seen.values():
        assert item.request.request_id in results or item.request.gateway in chaos.dead_gateways
    completed = sum(1 for one in heard if not one.stream.error) + len(gateway.answers)
    assert completed <= len(results)
    # No process, subscription or consumer is left over.
    assert all(process.child.poll() is None for process in services.processes.values())
    assert len(psutil.Process().children(recursive=True)) == children_before
    async with asyncio.timeout(30):
        while await connections(observer) != connections_before:
            await asyncio.sleep(0.5)
        while await asyncio.to_thread(observer.consumers) != consumers_before:
            await asyncio.sleep(0.5)


async def _calm(services: Services, body: dict[str, object]) -> str:
    async with aiohttp.ClientSession(headers=services.headers) as session:
        got = await stream(session, services.url, body)
    assert not got.error
    return got.text
