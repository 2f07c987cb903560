"""A deployment over the bus protocol: a router in a process of its own, and a gateway and workers in this one.

The workers compute nothing: a request holds its slot for a time in proportion to its cost.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import multiprocessing
import random
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from functools import partial

import psutil
import uvloop

from llmserve.bus.collector import rest_collector
from llmserve.bus.flow.router import Router
from llmserve.bus.flow.settings import RouterSettings, TenantSettings
from llmserve.bus.messages import (
    Accepted,
    AnyMessage,
    Finished,
    Grant,
    Heartbeat,
    Reason,
    Request,
    Result,
    Role,
    Running,
    Sync,
    decode,
)
from llmserve.bus.nats import NatsBus, connect
from llmserve.bus.server import EmbeddedServer
from tests.bus.flow.world import beat

DEPLOYMENT = "bench"
GATEWAY = "g0"
WEIGHTS = {"a": 1.0, "b": 1.0, "c": 2.0, "d": 4.0}
MAX_TOKENS = 256
BEAT_S = 0.25


async def route(url: str, token: str) -> None:
    bus = await connect(url, token, DEPLOYMENT, member="router")
    tenants = {name: TenantSettings(weight=weight) for name, weight in WEIGHTS.items()}
    router = Router(bus, RouterSettings(tenants=tenants), "router", rng=random.Random(1))
    await router.start()
    rest_collector(50_000)  # as ``llmserve-worker --role router`` does
    await router.run()


def router_process(url: str, token: str) -> None:
    uvloop.run(route(url, token))


@dataclass
class Job:
    """A request of this bench, and when what happened to it."""

    tenant: str
    prompt_tokens: int
    output_tokens: int
    sent_s: float = 0.0
    stored_s: float = math.inf
    """Its gateway knows that it is on the stream."""
    got_s: float = math.inf
    ended_s: float = math.inf

    @property
    def cost(self) -> int:
        return self.prompt_tokens + 2 * self.output_tokens


@dataclass
class Pool:
    """A gateway and the workers, as far as a router can see."""

    gateway: NatsBus
    bus: NatsBus
    """The workers'."""
    workers: int
    slots: int
    seconds_per_cost: float
    jobs: dict[str, Job] = field(default_factory=dict)
    running: dict[str, dict[int, Running]] = field(default_factory=dict)
    epoch: int = 0
    ended: asyncio.Queue[Job] = field(default_factory=asyncio.Queue)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    router_pid: int = 0

    def router_cpu_s(self) -> float:
        """CPU time of the router's process so far."""
        times = psutil.Process(self.router_pid).cpu_times()
        return float(times.user + times.system)

    async def join(self) -> None:
        for number in range(self.workers):
            name = f"w{number}"
            self.running[name] = {}
            await self.bus.subscribe(self.bus.subjects.work(name), partial(self.hear, name))
        await self.gateway.subscribe(self.gateway.subjects.gateway(GATEWAY), lambda message: None)
        await self.bus.subscribe(self.bus.subjects.control, self.sync)
        await self.gateway.flush()
        await self.bus.flush()
        self.keep(self.beats())

    async def leave(self) -> None:
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    def keep(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def send(self, job: Job) -> None:
        request_id = f"q{len(self.jobs)}"
        self.jobs[request_id] = job
        request = Request(
            request_id=request_id,
            gateway=GATEWAY,
            attempt=0,
            created_s=time.time(),
            prompt_tokens=job.prompt_tokens,
            max_tokens=MAX_TOKENS,
            api="a1",
            body=bytes(4 * job.prompt_tokens),
        )
        job.sent_s = time.monotonic()
        await self.gateway.accept(request, job.tenant, "interactive")
        job.stored_s = time.monotonic()

    def hear(self, worker: str, message: AnyMessage) -> None:
        if not isinstance(message, Grant):
            return
        got_s = time.monotonic()
        request = decode(message.request)
        assert isinstance(request, Request)
        job = self.jobs[request.request_id]
        assert job.got_s == math.inf, f"{request.request_id} was granted twice"
        job.got_s = got_s
        self.running[worker][message.seq] = Running(
            seq=message.seq,
            attempt=0,
            stage=message.stage,
            tenant=job.tenant,
            prompt_tokens=job.prompt_tokens,
            max_tokens=MAX_TOKENS,
        )
        accepted = Accepted(worker=worker, seq=message.seq, attempt=0, stage=message.stage, epoch=message.epoch)
        self.bus.publish(self.bus.subjects.events, accepted)
        self.keep(self.serve(worker, message, request.request_id, job))

    async def serve(self, worker: str, grant: Grant, request_id: str, job: Job) -> None:
        await asyncio.sleep(job.cost * self.seconds_per_cost)
        job.ended_s = time.monotonic()
        result = Result(
            request_id=request_id,
            attempt=0,
            worker=worker,
            reason=Reason.STOP,
            prompt_tokens=job.prompt_tokens,
            output_tokens=job.output_tokens,
        )
        await self.bus.finish(grant.seq, job.tenant, result)
        del self.running[worker][grant.seq]
        finished = Finished(
            worker=worker,
            seq=grant.seq,
            request_id=request_id,
            attempt=0,
            stage=grant.stage,
            reason=Reason.STOP,
            prompt_tokens=job.prompt_tokens,
            output_tokens=job.output_tokens,
        )
        self.bus.publish(self.bus.subjects.events, finished)
        self.ended.put_nowait(job)

    def sync(self, message: AnyMessage) -> None:
        if isinstance(message, Sync):
            self.epoch = message.epoch
            self.beat()

    def beat(self) -> None:
        subject = self.bus.subjects.heartbeats
        self.gateway.publish(subject, Heartbeat(member=GATEWAY, role=Role.GATEWAY, host="h", pid=1))
        for name, running in self.running.items():
            lines = list(running.values())
            self.bus.publish(
                subject,
                beat(name, Role.BOTH, slots=self.slots, pages_total=0, epoch=self.epoch, running=lines),
            )

    async def beats(self) -> None:
        while True:
            self.beat()
            await asyncio.sleep(BEAT_S)


@contextlib.asynccontextmanager
async def pool(server: EmbeddedServer, workers: int, slots: int, seconds_per_cost: float) -> AsyncIterator[Pool]:
    """With a router of its own in another process, which has heard of the workers."""
    gateway = await connect(server.url, server.token, DEPLOYMENT, member=GATEWAY)
    bus = await connect(server.url, server.token, DEPLOYMENT, member="workers")
    members = Pool(gateway, bus, workers, slots, seconds_per_cost)
    await members.join()
    process = multiprocessing.get_context("spawn").Process(
        target=router_process, args=(server.url, server.token), daemon=True
    )
    process.start()
    assert process.pid is not None
    members.router_pid = process.pid
    try:
        async with asyncio.timeout(30):
            while not members.epoch:
                await asyncio.sleep(0.05)
        await asyncio.sleep(1.5)
        yield members
    finally:
        process.kill()
        process.join()
        await members.leave()
        await gateway.close()
        await bus.close()
