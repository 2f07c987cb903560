"""What routers make of the silence while the bus itself is away: nothing."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from msgspec.structs import replace
from prometheus_client import CollectorRegistry

from llmserve.bus.flow.core import RouterCore
from llmserve.bus.flow.entry import Place
from llmserve.bus.flow.router import Router
from llmserve.bus.flow.settings import RouterSettings
from llmserve.bus.membership import Beater
from llmserve.bus.messages import AnyMessage, Cancel, Grant, Heartbeat, Role, Running, Stage
from llmserve.bus.nats import NatsBus
from llmserve.bus.server import EmbeddedServer
from llmserve.workers.router_service import RouterService
from tests.bus.conftest import JoinNats
from tests.bus.flow.world import beat, request
from tests.bus.samples import until

pytestmark = pytest.mark.faults

AWAY_S = 5.0
"""Longer than any silence after which a member is gone."""


async def killed(server: EmbeddedServer) -> None:
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    await asyncio.sleep(AWAY_S)
    server.restart()


async def stopped(server: EmbeddedServer) -> None:
    """Its connections stay open."""
    assert server.pid is not None
    os.kill(server.pid, signal.SIGSTOP)
    await asyncio.sleep(AWAY_S)
    os.kill(server.pid, signal.SIGCONT)


@dataclass
class Deployment:
    """A gateway, and a worker of one slot that runs what it is granted for ever."""

    gateway: NatsBus
    worker: NatsBus
    grants: list[Grant] = field(default_factory=list)
    running: list[Grant] = field(default_factory=list)
    cancels: list[Cancel] = field(default_factory=list)

    @asynccontextmanager
    async def alive(self) -> AsyncIterator[None]:
        await self.gateway.subscribe(self.gateway.subjects.gateway("g0"), lambda _: None)
        await self.gateway.subscribe(self.gateway.subjects.control, self._hear)
        await self.worker.subscribe(self.worker.subjects.work("w"), self._take)
        beaters = [
            Beater(self.gateway, lambda: Heartbeat(member="g0", role=Role.GATEWAY, host="h", pid=1)),
            Beater(self.worker, self._beat),
        ]
        for beater in beaters:
            beater.start()
        yield
        for beater in beaters:
            await beater.stop()

    async def accept(self, request_id: str, attempt: int = 0) -> int:
        return await self.gateway.accept(request(request_id, attempt), "acme", "interactive")

    async def stored(self) -> set[int]:
        return set((await self.gateway.contents()).seqs)

    def _hear(self, message: AnyMessage) -> None:
        if isinstance(message, Cancel):
            self.cancels.append(message)
            self.running.clear()

    def _take(self, message: AnyMessage) -> None:
        if isinstance(message, Grant):
            self.grants.append(message)
            self.running.append(message)

    def _beat(self) -> Heartbeat:
        running = [Running(seq=g.seq, attempt=g.attempt, stage=Stage.WHOLE) for g in self.running]
        return beat("w", Role.BOTH, slots=1, running=running, epoch=max((g.epoch for g in self.grants), default=0))


@pytest.fixture
async def deployment(join_nats: JoinNats) -> AsyncIterator[Deployment]:
    made = Deployment(await join_nats("g0"), await join_nats("w"))
    async with made.alive():
        yield made


def places(core: RouterCore) -> dict[int, Place]:
    return {entry.seq: entry.place for entry in core.ledger.entries.values()}


@pytest.mark.parametrize("away", [killed, stopped], ids=["killed", "stopped"])
async def test_a_leader_calls_nobody_gone_because_the_bus_is_away(
    away: Callable[[EmbeddedServer], Awaitable[None]],
    server: EmbeddedServer,
    join_nats: JoinNats,
    deployment: Deployment,
) -> None:
    router = Router(await join_nats("r0"), RouterSettings(), "r0")
    await router.start()
    leading = asyncio.create_task(router.run())
    accepted = {await deployment.accept("q1"), await deployment.accept("q2")}
    first, second = sorted(accepted)
    await until(lambda: places(router.core) == {first: Place.RUNNING, second: Place.QUEUED})
    await away(server)
    await until(lambda: router.watch.carries)
    await asyncio.sleep(2 * RouterSettings().member_timeout_s)
    assert await deployment.stored() == accepted
    assert places(router.core) == {first: Place.RUNNING, second: Place.QUEUED}
    assert list(router.core.ledger.workers) == ["w"]
    assert not deployment.cancels
    assert [grant.seq for grant in deployment.grants] == [first]
    await router.stop()
    await leading


async def test_a_standby_believes_after_an_outage_what_it_believed_before_and_harms_nothing_when_it_leads(
    server: EmbeddedServer, join_nats: JoinNats, deployment: Deployment
) -> None:
    leader = await join_nats("r0")
    await leader.lead("r0")
    await leader.subscribe(leader.subjects.router("r0"), lambda _: None)
    beater = Beater(leader, lambda: Heartbeat(member="r0", role=Role.ROUTER, host="h", pid=1), 0.25)
    beater.start()
    standby = RouterService(await join_nats("r1"), RouterSettings(), CollectorRegistry())
    standing_by = asyncio.create_task(standby.run())
    accepted = {await deployment.accept("q1"), await deployment.accept("q2")}
    await until(lambda: standby._router is not None)
    assert standby._router is not None
    core = standby._router.core
    await until(lambda: set(places(core)) == accepted)
    await killed(server)
    await until(lambda: server.pid is not None and leader.connected)
    await asyncio.sleep(2 * RouterSettings().member_timeout_s)
    assert not standby.leads, "the leader lives"
    assert set(places(core)) == accepted
    await beater.stop()
    await leader.close()
    await until(lambda: standby.leads)
    await until(lambda: len(deployment.grants) == 1)
    assert await deployment.stored() == accepted
    await standby.stop()
    await standing_by


async def test_a_gateway_that_stood_still_is_served_again(join_nats: JoinNats, deployment: Deployment) -> None:
    """What it had is over, since it seemed dead; the next attempts are not."""
    quiet = await join_nats("g1")
    router = Router(await join_nats("r0"), RouterSettings(member_timeout_s=1.5), "r0")
    await router.start()
    leading = asyncio.create_task(router.run())
    seq = await quiet.accept(replace(request("q1"), gateway="g1"), "acme", "interactive")
    await until(lambda: any("q1" in cancel.request_ids for cancel in deployment.cancels))
    await until(lambda: seq not in router.core.ledger.entries)
    again = await quiet.accept(replace(request("q1", 1), gateway="g1"), "acme", "interactive")
    await until(lambda: any(grant.seq == again for grant in deployment.grants))
    await router.stop()
    await leading
