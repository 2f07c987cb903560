from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest
from prometheus_client import CollectorRegistry

from llmserve.bus.base import Bus, Overtaken
from llmserve.bus.flow.router import Deposed, Router
from llmserve.bus.flow.settings import RouterSettings
from llmserve.bus.messages import (
    Accepted,
    AnyMessage,
    AttemptLost,
    Finished,
    Grant,
    HandedOff,
    Ping,
    Reason,
    Rejected,
    Request,
    Result,
    Role,
    Running,
    Stage,
    Sync,
    decode,
)
from llmserve.manifests.schema import (
    Budgets,
    FairShare,
    Manifest,
    Metadata,
    Models,
    PrimaryModel,
    Scheduling,
    Spec,
    Tenant,
)
from tests.bus.flow.fake_bus import FakeBus, Hub
from tests.bus.flow.world import beat, request


class ScriptedWorker:
    """Confirms and ends all that it is granted, a handoff after a prefill."""

    def __init__(self, bus: Bus, name: str, role: Role, *, ends: bool = True) -> None:
        self.bus, self.name, self.role, self.ends = bus, name, role, ends
        self.grants: list[Grant] = []
        self.running: dict[int, Running] = {}
        self.epoch = 0

    async def join(self) -> None:
        await self.bus.subscribe(self.bus.subjects.work(self.name), self.on_grant)
        await self.bus.subscribe(self.bus.subjects.control, self.on_control)
        self.beat()

    def beat(self) -> None:
        heartbeat = beat(self.name, self.role, epoch=self.epoch, running=list(self.running.values()))
        self.bus.publish(self.bus.subjects.heartbeats, heartbeat)

    def on_control(self, message: AnyMessage) -> None:
        if isinstance(message, Sync):
            self.epoch = message.epoch
            self.beat()

    def on_grant(self, grant: AnyMessage) -> None:
        if isinstance(grant, Ping):
            return
        assert isinstance(grant, Grant)
        self.grants.append(grant)
        self.running[grant.seq] = Running(seq=grant.seq, attempt=grant.attempt, stage=grant.stage)
        self.say(
            Accepted(worker=self.name, seq=grant.seq, attempt=grant.attempt, stage=grant.stage, epoch=grant.epoch)
        )
        if self.ends:
            asyncio.get_running_loop().create_task(self.end(grant))

    def say(self, message: Accepted | HandedOff | Finished) -> None:
        self.bus.publish(self.bus.subjects.events, message)

    async def end(self, grant: Grant) -> None:
        stored = await self.bus.fetch(grant.seq)
        assert stored is not None
        of = stored.request
        if grant.stage is Stage.PREFILL:
            self.running[grant.seq] = Running(seq=grant.seq, attempt=of.attempt, stage=grant.stage, held=True)
            self.say(HandedOff(worker=self.name, seq=grant.seq, request_id=of.request_id, attempt=of.attempt,
                               tokens=[1], pages=1, page_bytes=1, lease_s=30.0, params=b"p"))  # fmt: skip
            return
        result = Result(request_id=of.request_id, attempt=of.attempt, worker=self.name, reason=Reason.STOP,
                        prompt_tokens=of.prompt_tokens, output_tokens=3)  # fmt: skip
        await self.bus.finish(grant.seq, grant.tenant, result)
        del self.running[grant.seq]
        self.say(Finished(worker=self.name, seq=grant.seq, request_id=of.request_id, attempt=of.attempt,
                          stage=grant.stage, reason=Reason.STOP, prompt_tokens=1, output_tokens=3))  # fmt: skip


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


async def test_requests_pass_through_prefill_and_decode_and_leave_the_stream() -> None:
    hub = Hub()
    bus = FakeBus(hub)
    registry = CollectorRegistry()
    router = Router(bus, RouterSettings(), "r0", registry=registry)
    await router.start()
    run = asyncio.create_task(router.run())
    prefill, decoder = ScriptedWorker(bus, "p", Role.PREFILL), ScriptedWorker(bus, "d", Role.DECODE)
    await prefill.join()
    await decoder.join()
    for number in range(20):
        await bus.accept(request(f"q{number}"), "a", "interactive")
    await until(lambda: not hub.stream and not router.core.ledger.entries)
    assert len(prefill.grants) == len(decoder.grants) == 20
    assert all(isinstance(decode(grant.handoff), HandedOff) for grant in decoder.grants)
    router.core.check()
    router.metrics.update(router.core)
    assert registry.get_sample_value("llmserve_grants_total", {"stage": "decode"}) == 20
    assert registry.get_sample_value("llmserve_kv_pages", {"worker": "d", "state": "total"}) == 100
    assert registry.get_sample_value("llmserve_dispatch_seconds_count", {"stage": "prefill"}) == 20
    await router.stop()
    await run


async def test_handoffs_that_wait_for_the_budget_of_kv_transfers_go_when_it_allows_with_no_other_event() -> None:
    """Without ``run`` there are no ticks: only the timer that the core asks for is left to wake the router."""
    hub = Hub()
    bus = FakeBus(hub)
    router = Router(bus, RouterSettings(max_kv_io_bytes_per_s=20.0), "r0")
    await router.start()
    prefill, decoder = ScriptedWorker(bus, "p", Role.PREFILL), ScriptedWorker(bus, "d", Role.DECODE)
    await prefill.join()
    await decoder.join()
    began_s = time.monotonic()
    for number in range(26):
        await bus.accept(request(f"q{number}"), "a", "interactive")
    await until(lambda: not hub.stream)
    assert len(decoder.grants) == 26
    assert time.monotonic() - began_s >= 6 / 20 - 0.02
    await router.stop()


async def test_a_large_request_is_granted_by_its_sequence_alone() -> None:
    bus = FakeBus(Hub())
    router = Router(bus, RouterSettings(), "r0")
    await router.start()
    worker = ScriptedWorker(bus, "w", Role.BOTH)
    await worker.join()
    small, large = request("small"), request("large", body=b"x" * 300_000)
    await bus.accept(small, "a", "interactive")
    await bus.accept(large, "a", "interactive")
    await until(lambda: len(worker.grants) == 2)
    payloads = {grant.seq: grant.request for grant in worker.grants}
    assert isinstance(decode(payloads[1]), Request)
    assert payloads[2] == b""
    await router.stop()


async def test_a_new_leader_grants_nothing_that_still_runs_and_deposes_the_old_one() -> None:
    hub = Hub()
    bus = FakeBus(hub)
    old, new = Router(bus, RouterSettings(), "r0"), Router(bus, RouterSettings(), "r1")
    await old.start()
    await new.listen()
    worker = ScriptedWorker(bus, "w", Role.BOTH, ends=False)
    await worker.join()
    run = asyncio.create_task(old.run())
    for number in range(3):
        await bus.accept(request(f"q{number}"), "a", "interactive")
    await until(lambda: len(worker.grants) == 3)
    await new.start()
    with pytest.raises(Deposed):
        await asyncio.wait_for(run, 5)
    await bus.accept(request("q3"), "a", "interactive")
    await until(lambda: len(worker.grants) == 4)
    assert [(grant.seq, grant.epoch) for grant in worker.grants] == [(1, 1), (2, 1), (3, 1), (4, 2)]
    assert new.core.stats.adopted == 3
    await old.stop()
    await new.stop()


async def test_a_leader_that_never_listened_waits_for_inventories_before_it_grants() -> None:
    hub = Hub()
    bus = FakeBus(hub)
    await bus.accept(request("q0"), "a", "interactive")
    router = Router(bus, RouterSettings(sync_wait_s=0.3), "r0")
    start = asyncio.create_task(router.start())
    await asyncio.sleep(0.05)
    late = ScriptedWorker(bus, "late", Role.BOTH, ends=False)
    late.running[1] = Running(seq=1, attempt=0, stage=Stage.WHOLE)
    other = ScriptedWorker(bus, "other", Role.BOTH, ends=False)
    await other.join()
    assert not start.done()
    await late.join()
    await start
    await asyncio.sleep(0.05)
    assert other.grants == late.grants == []
    await router.stop()


async def test_a_worker_that_nobody_hears_is_dropped_and_its_grant_goes_elsewhere() -> None:
    bus = FakeBus(Hub())
    router = Router(bus, RouterSettings(), "r0")
    await router.start()
    run = asyncio.create_task(router.run())
    bus.publish(bus.subjects.heartbeats, beat("ghost", Role.BOTH))
    await bus.accept(request("q0"), "a", "interactive")
    await until(lambda: "ghost" not in router.core.ledger.workers)
    worker = ScriptedWorker(bus, "w", Role.BOTH)
    await worker.join()
    await until(lambda: len(worker.grants) == 1)
    await router.stop()
    await run


async def test_a_standby_knows_what_the_leader_knows_and_says_nothing() -> None:
    hub = Hub()
    bus = FakeBus(hub)
    heard: list[AnyMessage] = []
    for subject in (bus.subjects.gateway("g0"), bus.subjects.control):
        await bus.subscribe(subject, heard.append)
    standby = Router(bus, RouterSettings(), "r1")
    await standby.listen()
    worker = ScriptedWorker(bus, "w", Role.BOTH, ends=False)
    await worker.join()
    for number in range(3):
        await bus.accept(request(f"q{number}"), "a", "interactive")
    worker.running[1] = Running(seq=1, attempt=0, stage=Stage.WHOLE)
    worker.beat()
    bus.publish(bus.subjects.heartbeats, beat("w", Role.BOTH, leaving=True))
    standby.stand_by()
    assert sorted(standby.core.ledger.entries) == [1, 2, 3]
    assert worker.grants == heard == []
    assert hub.discarded == []
    await worker.join()
    await standby.start(over=0)
    lost = [message for message in heard if isinstance(message, AttemptLost)]
    assert [(message.seq, message.epoch) for message in lost] == [(1, 1)]
    await until(lambda: {grant.seq for grant in worker.grants} == {2, 3})
    await standby.stop()


async def test_a_new_leader_holds_what_it_knew_against_what_is_stored() -> None:
    hub = Hub()
    bus = FakeBus(hub)
    await bus.subscribe(bus.subjects.gateway("g0"), lambda _: None)
    standby = Router(bus, RouterSettings(sync_wait_s=0.1), "r1")
    await standby.listen()
    for number in range(3):
        await bus.accept(request(f"q{number}"), "a", "interactive")
    del hub.stream[2]  # finished, and nobody heard of it
    forgotten = hub.followers.pop()
    await bus.accept(request("q3"), "a", "interactive")
    hub.followers.append(forgotten)
    await standby.start()
    assert sorted(standby.core.ledger.entries) == [1, 3, 4]
    await standby.stop()


async def test_of_two_standbys_one_leads() -> None:
    bus = FakeBus(Hub())
    routers = [Router(bus, RouterSettings(), f"r{number}") for number in range(2)]
    for router in routers:
        await router.listen()
    ends = await asyncio.gather(*(router.start(over=0) for router in routers), return_exceptions=True)
    assert [type(end) for end in ends] == [type(None), Overtaken]
    assert [router.leads for router in routers] == [True, False]
    for router in routers:
        await router.stop()


async def test_a_leader_that_stood_still_condemns_nobody_and_grants_nothing_before_it_knows_that_it_leads() -> None:
    hub = Hub()
    bus = FakeBus(hub)
    heard: list[AnyMessage] = []
    await bus.subscribe(bus.subjects.gateway("g0"), heard.append)
    now_s = 0.0
    router = Router(bus, RouterSettings(), "r0", clock=lambda: now_s)
    await router.start()
    worker = ScriptedWorker(bus, "w", Role.BOTH, ends=False)
    await worker.join()
    await bus.accept(request("q0"), "a", "interactive")
    await until(lambda: len(worker.grants) == 1)
    run = asyncio.create_task(router.run())
    await asyncio.sleep(0.1)
    now_s += 10.0
    time.sleep(1.8)  # noqa: ASYNC251 - as if stopped
    await asyncio.sleep(0.6)
    assert all(isinstance(message, Ping) for message in heard)
    await bus.lead("r1")
    time.sleep(1.8)  # noqa: ASYNC251
    with pytest.raises(Deposed):
        await asyncio.wait_for(run, 1)
    await router.stop()


async def test_a_gateway_hears_of_lost_attempts_and_rejections() -> None:
    hub = Hub()
    bus = FakeBus(hub)
    heard: list[AnyMessage] = []
    await bus.subscribe(bus.subjects.gateway("g0"), heard.append)
    router = Router(bus, RouterSettings(), "r0")
    await router.start()
    worker = ScriptedWorker(bus, "w", Role.BOTH, ends=False)
    await worker.join()
    await bus.accept(request("long", prompt_tokens=5000), "a", "interactive")
    await bus.accept(request("q0"), "a", "interactive")
    await until(lambda: len(worker.grants) == 1)
    bus.publish(bus.subjects.heartbeats, beat("w", Role.BOTH, leaving=True))
    await until(lambda: len(heard) == 2 and hub.discarded == [1])
    assert isinstance(heard[0], Rejected)
    assert isinstance(heard[1], AttemptLost)
    await router.stop()


def test_settings_come_from_the_manifest() -> None:
    manifest = Manifest(
        metadata=Metadata(name="d"),
        spec=Spec(
            models=Models(primary=PrimaryModel(id="m")),
            budgets=Budgets(max_tokens_in_flight=9, max_decode_concurrency=2),
            scheduling=Scheduling(fair_share=FairShare(tenants={"gold": Tenant(weight=3, max_concurrency=4)})),
        ),
    )
    settings = RouterSettings.from_manifest(manifest)
    assert (settings.max_tokens_in_flight, settings.max_decode_concurrency) == (9, 2)
    assert (settings.tenant("gold").weight, settings.tenant("gold").max_concurrency) == (3, 4)
    assert settings.tenant("unknown").weight == 1
