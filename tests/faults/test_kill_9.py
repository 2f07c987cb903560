"""``kill -9`` of workers, a gateway and the nats-server under load: nothing hangs, differs or stays held."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest

from tests.bench.load import Stream, prompt_bodies, stream
from tests.faults.load import asked, prompt, require_exact, require_once
from tests.faults.observer import Observer
from tests.processes import wait_for
from tests.services import Services
from tests.sim_gateway import SimGateway

pytestmark = pytest.mark.faults


async def answers(services: Services, bodies: list[dict[str, object]], over_s: float = 0.0) -> list[Stream]:
    """Streams that start evenly within ``over_s``."""
    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(headers=services.headers, timeout=timeout) as session:

        async def one(index: int) -> Stream:
            await asyncio.sleep(over_s * index / len(bodies))
            return await stream(session, services.url, bodies[index])

        return await asyncio.gather(*(one(index) for index in range(len(bodies))))


@pytest.mark.parametrize("victim", ["prefill-2", "decode-2"])
async def test_every_stream_ends_as_if_no_worker_had_died(
    services: Services, observer: Observer, victim: str
) -> None:
    bodies = prompt_bodies(services.model, 24, 300, 200, seed=len(victim))
    undisturbed = await answers(services, bodies)
    running = asyncio.create_task(answers(services, bodies, over_s=2.0))
    await asyncio.sleep(1.0)
    services.processes[victim].kill()
    streams = await running
    assert not [s.error for s in streams if s.error]
    assert [s.text for s in streams] == [s.text for s in undisturbed]
    assert {s.finish_reason for s in streams} == {"length"}
    # Whoever lost its worker waits a moment, and then for its turn.
    assert max(max(s.ttft_s, s.longest_pause_s) for s in streams) < 10
    services.start(victim, victim.removesuffix("-2"))
    await asyncio.to_thread(services.processes[victim].wait_for_line, "ready after", 30)
    await observer.settled(13)


async def test_what_a_killed_gateway_left_is_gone_within_two_seconds_and_others_go_on(
    services: Services, observer: Observer, gateway: SimGateway
) -> None:
    member = await observer.member(services.processes["gateway"])
    dying = asyncio.create_task(answers(services, prompt_bodies(services.model, 60, 100, 1500)))
    others = asyncio.create_task(asked(gateway, 12, 250))
    await asyncio.sleep(1.5)
    assert 0 < observer.left_by(member) < await observer.stored_by(member)  # some run, some are queued
    services.processes["gateway"].kill()
    async with asyncio.timeout(4):  # two, on a machine that does nothing else
        while observer.left_by(member) or await observer.stored_by(member):
            await asyncio.sleep(0.05)
    assert all(s.error for s in await dying)
    require_exact(await others)
    await observer.settled(10)
    services.start("gateway")
    await asyncio.to_thread(services.ready)


async def test_a_killed_nats_server_costs_a_pause_and_no_request(
    services: Services, observer: Observer, gateway: SimGateway
) -> None:
    asking = asyncio.create_task(asked(gateway, 30, 150, over_s=1.5))
    running = asyncio.create_task(answers(services, prompt_bodies(services.model, 16, 100, 300)))
    await asyncio.sleep(0.8)
    services.processes["nats"].kill()
    waiting = asyncio.create_task(gateway.ask(prompt(500), 20))
    await asyncio.sleep(0.5)
    services.start("nats")
    assert not [s.error for s in await running if s.error]
    require_exact([*await asking, await waiting])
    await require_once(observer, {gateway.member})
    await observer.settled(13)


def test_all_members_are_well_at_the_end(services: Services) -> None:
    def ready() -> bool:
        return all(process.child.poll() is None for process in services.processes.values())

    wait_for(ready, 1, "all processes")
