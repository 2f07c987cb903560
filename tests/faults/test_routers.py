"""The leading router killed, stopped and woken, or killed together with workers: a standby takes over."""

from __future__ import annotations

import asyncio
import signal

import pytest

from tests.faults.load import asked, prompt, require_exact, require_once
from tests.faults.observer import Observer
from tests.services import Services
from tests.sim_gateway import SimGateway

pytestmark = pytest.mark.faults


async def test_a_standby_takes_over_from_a_killed_leader_under_load(
    services: Services, observer: Observer, gateway: SimGateway
) -> None:
    leader = await observer.leader()
    asking = asyncio.create_task(asked(gateway, 60, 60, over_s=2.0))
    await asyncio.sleep(1.0)
    services.processes[leader].kill()
    assert await observer.leader() != leader
    require_exact(await asking)
    await require_once(observer, {gateway.member})
    services.start(leader, "router")


async def test_a_leader_that_hangs_is_replaced_and_when_it_wakes_it_stands_by_and_harms_nobody(
    services: Services, observer: Observer, gateway: SimGateway
) -> None:
    leader = await observer.leader()
    hung = services.processes[leader]
    asking = asyncio.create_task(asked(gateway, 80, 60, over_s=6.0))
    await asyncio.sleep(1.0)
    hung.child.send_signal(signal.SIGSTOP)
    _, epoch = await observer.bus.leader()
    async with asyncio.timeout(10):
        while (await observer.bus.leader())[1] == epoch:
            await asyncio.sleep(0.05)
    await asyncio.sleep(1.0)
    hung.child.send_signal(signal.SIGCONT)
    require_exact(await asking)
    await require_once(observer, {gateway.member})
    await asyncio.to_thread(hung.wait_for_line, "standing by", 10)


async def test_leader_and_workers_killed_together(
    services: Services, observer: Observer, gateway: SimGateway
) -> None:
    victims = {await observer.leader(): "router", "prefill-2": "prefill", "decode-2": "decode"}
    asking = asyncio.create_task(asked(gateway, 60, 60, over_s=2.0))
    await asyncio.sleep(1.0)
    for name in victims:
        services.processes[name].kill()
    require_exact(await asking)
    for name, service in victims.items():
        services.start(name, service)
    await require_once(observer, {gateway.member})


async def test_when_every_router_is_gone_requests_wait_for_the_next(
    services: Services, observer: Observer, gateway: SimGateway
) -> None:
    for name in ("router", "router-2"):
        services.processes[name].kill()
    waiting = [await gateway.send(prompt(number), 20) for number in range(10)]
    await asyncio.sleep(0.5)
    assert not any(answer.tokens for answer in waiting)
    for name in ("router", "router-2"):
        services.start(name, "router")
    await asyncio.gather(*(answer.done.wait() for answer in waiting))
    require_exact(waiting)


async def test_everything_is_given_back_at_the_end(observer: Observer) -> None:
    await observer.settled(10)
