"""A random component is killed every few seconds under load; then everything is accounted for.

Two minutes on simulated engines unless ``LLMSERVE_CHAOS_S`` and ``LLMSERVE_CHAOS_ENGINE=vllm`` say otherwise;
``LLMSERVE_CHAOS_SEED`` repeats a run.
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
from tests.faults.conftest import ON_VLLM, all_joined
from tests.faults.load import prompt, require_exact
from tests.faults.observer import Observer
from tests.services import Services
from tests.sim_gateway import Answer, SimGateway

pytestmark = pytest.mark.faults

SECONDS = float(os.environ.get("LLMSERVE_CHAOS_S", "120"))
SEED = int(os.environ.get("LLMSERVE_CHAOS_SEED", str(random.randrange(10**6))))
KINDS = ("gateway", "leader", "prefill", "decode", "nats")


@dataclass(frozen=True)
class Load:
    """What is asked, and how often something is killed; bounds of lengths are in tokens."""

    http_clients: int
    bodies: int
    """Different requests of the HTTP clients."""
    body: tuple[int, int]
    """(prompt, output)"""
    asked: int
    """Different requests of the client on the bus."""
    asked_per_s: float
    prompt: tuple[int, int]
    output: tuple[int, int]
    pause_s: tuple[float, float]
    """Between two kills."""
    spares_last_worker: bool
    """Whether no worker is killed while the other one of its role starts: that takes longer than a request whose
    client has seen it begin waits for a worker."""
    patience_s: float
    """For all that is open to end."""


SIMULATED = Load(8, 24, (200, 150), 500, 20.0, (20, 400), (5, 150), (1.0, 3.0), False, 60)
VLLM = Load(2, 6, (60, 40), 16, 0.7, (20, 100), (5, 40), (1.0, 5.0), True, 150)
LOAD = VLLM if ON_VLLM else SIMULATED


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
            await asyncio.sleep(self.rng.uniform(*LOAD.pause_s))
            if not bag:
                bag = self.rng.sample(KINDS, len(KINDS))
            await self.kill(bag.pop())

    async def kill(self, kind: str) -> None:
        name = kind
        if kind == "leader":
            name = await self.observer.leader()
        elif kind in ("prefill", "decode"):
            name, twin = self.rng.sample([kind, f"{kind}-2"], 2)
            if LOAD.spares_last_worker and not self.serves(twin):
                return
        process = self.services.processes[name]
        if kind == "gateway":
            if not self.serves(name):
                return
            self.dead_gateways.add(await self.observer.member(process))
            self.gateway_died_s.append(time.monotonic())
        process.kill()
        self.kills[kind] += 1
        # A server may be away for longer than any silence after which a member is gone.
        await asyncio.sleep(self.rng.uniform(0.1, 5.0 if kind == "nats" else 1.0))
        service = {"leader": "router"}.get(kind, kind)
        self.services.start(name, None if name == service else service)

    def serves(self, name: str) -> bool:
        """Whether a process has started and was heard."""
        pid = self.services.processes[name].pid
        return pid in {beat.pid for beat in self.observer.beats.values()}


NOT_SENT = ("ClientConnect", "ClientOSError")
"""Errors of a client that finds nobody, or has a connection to somebody dead."""


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
            got = await stream(session, services.url, bodies[index % len(bodies)])
            if got.chunks == 0 and got.error.startswith(NOT_SENT):
                await asyncio.sleep(0.2)  # there is no gateway at the moment
                continue
            heard.append(Heard(index % len(bodies), began_s, time.monotonic(), got))
            index += LOAD.http_clients
    return heard


@dataclass(frozen=True)
class Question:
    prompt: list[int]
    max_tokens: int


def questions(rng: random.Random) -> list[Question]:
    return [Question(prompt(k, rng.randint(*LOAD.prompt)), rng.randint(*LOAD.output)) for k in range(LOAD.asked)]


async def bus_client(gateway: SimGateway, asked: list[Question], stop_s: float, rng: random.Random) -> int:
    """Asks all the time; returns how many requests were not accepted."""
    refused = 0
    sent: list[asyncio.Task[object]] = []
    while time.monotonic() < stop_s:
        question = asked[len(sent) % len(asked)]
        sent.append(asyncio.create_task(gateway.send(question.prompt, question.max_tokens)))
        await asyncio.sleep(rng.expovariate(LOAD.asked_per_s))
    for end in await asyncio.gather(*sent, return_exceptions=True):
        if isinstance(end, BusError):
            refused += 1
        elif isinstance(end, BaseException):
            raise end
    return refused


async def require_as_when_calm(gateway: SimGateway, chaotic: list[Answer], asked: list[Question]) -> None:
    """Every answer is the one that the same question has when nothing dies."""
    assert not [answer.error for answer in chaotic if answer.error]
    calm = await asyncio.gather(*(gateway.ask(question.prompt, question.max_tokens) for question in asked))
    tokens = {tuple(answer.prompt): answer.tokens for answer in calm}
    for answer in chaotic:
        assert len(answer.tokens) == answer.max_tokens
        assert answer.tokens == tokens[tuple(answer.prompt)]


async def connections(observer: Observer) -> Counter[tuple[str, int]]:
    return await asyncio.to_thread(observer.connections)


async def test_after_any_deaths_every_request_has_ended_once_and_nothing_is_left(
    services: Services, observer: Observer, gateway: SimGateway
) -> None:
    print(f"LLMSERVE_CHAOS_SEED={SEED}")
    rng = random.Random(SEED)
    bodies, asked = prompt_bodies(services.model, LOAD.bodies, *LOAD.body, seed=41), questions(rng)
    connections_before = await connections(observer)
    consumers_before = await asyncio.to_thread(observer.consumers)
    children_before = len(psutil.Process().children(recursive=True))

    chaos = Chaos(services, observer, rng)
    stop_s = time.monotonic() + SECONDS
    clients = [asyncio.create_task(http_client(services, bodies, stop_s, k)) for k in range(LOAD.http_clients)]
    asking = asyncio.create_task(bus_client(gateway, asked, stop_s, random.Random(SEED + 1)))
    await chaos.run(SECONDS)
    await asyncio.to_thread(services.ready, LOAD.patience_s)
    await asyncio.to_thread(all_joined, services, LOAD.patience_s)
    heard = [one for client in clients for one in await client]
    refused = await asking
    async with asyncio.timeout(LOAD.patience_s):
        await asyncio.gather(*(answer.done.wait() for answer in gateway.answers))
    await observer.settled(30)
    print(f"kills {dict(chaos.kills)}, {len(gateway.answers)} bus and {len(heard)} HTTP requests, {refused} refused")

    # Every request of the gateway that lived on ended with exactly its tokens.
    chaotic = list(gateway.answers)
    if ON_VLLM:
        await require_as_when_calm(gateway, chaotic, asked)
    else:
        require_exact(chaotic)
    assert refused == 0
    # Of the others', each that did not lose its gateway.
    calm = await asyncio.gather(*(_calm(services, body) for body in bodies))
    for one in heard:
        if any(one.began_s <= died_s <= one.ended_s for died_s in chaos.gateway_died_s):
            continue
        assert not one.stream.error
        assert one.stream.text == calm[one.body]
    # Each has one record, unless nobody waited for it any more; a client hears of the end before it is recorded.
    await observer.settled(30)
    results, recorded = await observer.results()
    assert recorded == len(results)
    for item in observer.seen.values():
        assert item.request.request_id in results or item.request.gateway in chaos.dead_gateways, item.seq
    completed = sum(1 for one in heard if not one.stream.error) + len(gateway.answers)
    assert completed <= len(results)
    # No process, subscription or consumer is left over.
    assert all(process.child.poll() is None for process in services.processes.values())
    assert len(psutil.Process().children(recursive=True)) == children_before
    end_s = time.monotonic() + 30
    while (now := await connections(observer)) != connections_before:
        assert time.monotonic() < end_s, f"more: {now - connections_before}, less: {connections_before - now}"
        await asyncio.sleep(0.5)
    while (consumers := await asyncio.to_thread(observer.consumers)) != consumers_before:
        assert time.monotonic() < end_s, f"{consumers} consumers, {consumers_before} before"
        await asyncio.sleep(0.5)


async def _calm(services: Services, body: dict[str, object]) -> str:
    async with aiohttp.ClientSession(headers=services.headers) as session:
        got = await stream(session, services.url, body)
    assert not got.error
    return got.text
