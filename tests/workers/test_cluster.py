"""A router and workers of every role together: each request ends exactly once, also when a worker dies."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field

import pytest

from llmserve.bus.flow.router import Router
from llmserve.bus.flow.settings import RouterSettings
from llmserve.bus.membership import Beater
from llmserve.bus.messages import (
    AnyMessage,
    AttemptLost,
    Deltas,
    Heartbeat,
    Reason,
    Rejected,
    Request,
    Role,
)
from llmserve.workers.engine.simulated import SimulatedEngine
from llmserve.workers.reports import Identity
from llmserve.workers.worker import Worker, WorkerSettings
from tests.workers.test_worker import SLOW, MortalEngine
from tests.workers.world import World, body, expected, request, settings, until

REQUESTS = 200


@dataclass
class Stream:
    """One request as a gateway sees it."""

    prompt: list[int]
    max_tokens: int
    attempt: int = 0
    tokens: list[int] = field(default_factory=list)
    ended: list[Reason] = field(default_factory=list)


class Gateway:
    """As much of a gateway as drops what is old, and resumes what was lost."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.streams: dict[str, Stream] = {}
        self.lost = 0
        self.rejected: list[Rejected] = []
        self.beater = Beater(world.bus, lambda: Heartbeat(member="g1", role=Role.GATEWAY, host="h", pid=1))
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        await self.world.bus.subscribe(self.world.subjects.gateway("g1"), self.hear)
        self.beater.start()

    async def send(self, request_id: str, prompt: list[int], max_tokens: int) -> None:
        self.streams[request_id] = Stream(prompt, max_tokens)
        await self.world.bus.accept(self.item(request_id), "t", "i")

    def item(self, request_id: str) -> Request:
        stream = self.streams[request_id]
        prompt = [*stream.prompt, *stream.tokens]
        left = stream.max_tokens - len(stream.tokens)
        return request(
            request_id,
            prompt=prompt,
            max_tokens=left,
            attempt=stream.attempt,
            offset=len(stream.tokens),
            body=body(prompt, left),
        )

    def hear(self, message: AnyMessage) -> None:
        if isinstance(message, Deltas):
            for delta in message.items:
                stream = self.streams[delta.request_id]
                if delta.attempt != stream.attempt:
                    continue
                assert delta.offset == len(stream.tokens)
                stream.tokens += delta.tokens
                if delta.reason is not None:
                    stream.ended.append(delta.reason)
        elif isinstance(message, AttemptLost):
            task = asyncio.create_task(self.again(message))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif isinstance(message, Rejected):
            self.rejected.append(message)

    async def again(self, lost: AttemptLost) -> None:
        stream = self.streams[lost.request_id]
        if lost.attempt != stream.attempt or stream.ended:
            return
        self.lost += 1
        stream.attempt += 1
        await self.world.bus.accept(self.item(lost.request_id), "t", "i")
        await self.world.bus.discard(lost.seq)


class Cluster:
    def __init__(self) -> None:
        self.world = World()
        self.gateway = Gateway(self.world)
        self.router = Router(self.world.broker.bus("router"), RouterSettings(), "router")
        self.routing: asyncio.Task[None] | None = None

    async def open(self) -> None:
        await self.world.open()
        await self.gateway.open()
        await self.router.start()
        self.routing = asyncio.create_task(self.router.run())

    async def close(self) -> None:
        await self.gateway.beater.stop()
        await self.router.stop()
        assert self.routing is not None
        await self.routing
        await self.world.close()

    async def settled(self) -> None:
        streams = self.gateway.streams.values()
        await until(lambda: all(stream.ended for stream in streams) or self.gateway.rejected, 60)
        await until(lambda: not self.world.broker.requests)
        alive = [worker for worker, _ in self.world.workers if worker.alive]
        await until(lambda: all(worker.state.idle for worker in alive))
        assert not self.gateway.rejected
        for stream in streams:
            assert stream.ended == [Reason.LENGTH]
            assert stream.tokens == expected(stream.prompt, stream.max_tokens)
        assert len(self.world.broker.results) == len(streams)
        self.router.core.check()
        for worker in alive:
            assert worker._engine.load().pages_free == worker.state.info.pages_total


async def send_all(cluster: Cluster, max_tokens: int) -> None:
    for k in range(REQUESTS):
        await cluster.gateway.send(f"r{k}", [k + 1, *range(10 + k % 90)], max_tokens)


@pytest.mark.parametrize("roles", [[Role.PREFILL, Role.DECODE, Role.DECODE], [Role.BOTH, Role.BOTH]])
async def test_200_requests_end_exactly_once_each(roles: list[Role]) -> None:
    cluster = Cluster()
    await cluster.open()
    for role in roles:
        await cluster.world.worker(role, pages=256)
    await send_all(cluster, 12)
    await cluster.settled()
    assert cluster.gateway.lost == 0
    ends = Counter(result.worker for result in cluster.world.broker.results.values())
    assert len(ends) == len([role for role in roles if role is not Role.PREFILL])
    await cluster.close()


@pytest.mark.parametrize("victim", [0, 2])
async def test_200_requests_end_exactly_once_each_though_an_engine_dies(victim: int) -> None:
    cluster = Cluster()
    await cluster.open()
    engines = []
    for role in (Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE):
        engines.append(MortalEngine(settings(pages=256, timing=SLOW, lease_s=3.0)))
        await cluster.world.worker(role, engine=engines[-1])
    await send_all(cluster, 6)
    await until(lambda: len(cluster.world.broker.results) > 20, 30)
    engines[victim].death.set()
    await until(lambda: cluster.world.workers[victim][1].done())
    await cluster.world.workers[victim][0].stop()
    await cluster.settled()
    assert cluster.gateway.lost > 0
    await cluster.close()


async def test_200_requests_end_exactly_once_each_though_a_worker_falls_silent() -> None:
    cluster = Cluster()
    await cluster.open()
    await cluster.world.worker(Role.BOTH, pages=256)
    bus = cluster.world.broker.bus("silent")
    silent = Worker(
        bus,
        SimulatedEngine(settings(pages=256, timing=SLOW)),
        Identity("silent", Role.BOTH),
        WorkerSettings(),
        cluster.world.workers[0][0]._metrics,
    )
    await silent.start()
    running = asyncio.create_task(silent.run())
    await send_all(cluster, 8)
    await until(lambda: silent.state.tasks)
    # As kill -9 does it: no farewell, the subscriptions are gone, nothing is published any more.
    running.cancel()
    await silent._beater.stop()
    for subscription in silent._subscriptions:
        await subscription.unsubscribe()
    await cluster.settled()
    assert cluster.gateway.lost > 0
    await bus.close()
    await silent.stop()
    await cluster.close()
