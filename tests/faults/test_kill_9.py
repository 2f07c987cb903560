"""``kill -9`` of each role under load, on simulated engines in separate processes: nothing hangs or stays held."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import aiohttp
import pytest

from tests.bench.load import Stream, prompt_bodies, stream
from tests.processes import metrics, total, wait_for
from tests.services import Services

pytestmark = pytest.mark.faults

LEASE_S = 5.0
ROLES = ["gateway", "router", "prefill", "decode"]


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    changes = {"transfer.lease_s": LEASE_S, "transfer.timeout_s": 2.0}
    services = Services(tmp_path_factory.mktemp("faults"), "sim.yaml", changes)
    try:
        services.start_all(ROLES)
        services.start("prefill-2", "prefill")
        services.start("decode-2", "decode")
        services.ready()
        yield services
    finally:
        services.end()


async def under_load(services: Services, victim: str, streams: int = 24, tokens: int = 200) -> list[Stream]:
    """Streams that start over two seconds, in the middle of which ``victim`` is killed; returns how each ended."""
    bodies = prompt_bodies(services.model, streams, 300, tokens, seed=hash(victim) % 1000)
    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(headers=services.headers, timeout=timeout) as session:

        async def one(index: int) -> Stream:
            await asyncio.sleep(2.0 * index / streams)
            return await stream(session, services.url, bodies[index])

        tasks = [asyncio.create_task(one(index)) for index in range(streams)]
        await asyncio.sleep(1.0)
        services.processes[victim].kill()
        return await asyncio.gather(*tasks)


async def settled(services: Services) -> None:
    """All queues empty and all pages free, at the latest a lease after."""
    end = time.monotonic() + LEASE_S + 8
    while True:
        figures = metrics(services.metrics_url("router"))
        left = {
            name: total(figures, name, **labels)
            for name, labels in (
                ("llmserve_queue_depth", {}),
                ("llmserve_tokens_in_flight", {}),
                ("llmserve_kv_pages", {"state": "used"}),
            )
        }
        if not any(left.values()):
            return
        assert time.monotonic() < end, left
        await asyncio.sleep(0.25)


@pytest.mark.parametrize("victim", ["prefill-2", "decode-2"])
async def test_every_stream_ends_and_every_page_is_free_again(services: Services, victim: str) -> None:
    streams = await under_load(services, victim)
    assert not [s.error for s in streams if s.error]
    assert {s.chunks > 0 and s.finish_reason for s in streams} == {"length"}
    # Whoever lost its worker waits for the missing heartbeats, three seconds, and then for its turn.
    assert max(max(s.ttft_s, s.longest_pause_s) for s in streams) < 10
    await settled(services)
    services.start(victim, victim.removesuffix("-2"))
    services.processes[victim].wait_for_line("ready after", 30)


async def test_answers_are_the_same_with_and_without_a_death_in_between(services: Services) -> None:
    bodies = prompt_bodies(services.model, 8, 300, 200, seed=5)

    async def answers() -> list[str]:
        async with aiohttp.ClientSession(headers=services.headers) as session:
            return [s.text for s in await asyncio.gather(*(stream(session, services.url, body) for body in bodies))]

    undisturbed = await answers()
    running = asyncio.create_task(answers())
    await asyncio.sleep(1.0)
    services.processes["decode-2"].kill()
    assert await running == undisturbed
    services.start("decode-2", "decode")
    services.processes["decode-2"].wait_for_line("ready after", 30)


async def test_a_killed_gateway_leaves_nothing_running(services: Services) -> None:
    bodies = prompt_bodies(services.model, 8, 100, 1500)
    async with aiohttp.ClientSession(headers=services.headers) as session:
        tasks = [asyncio.create_task(stream(session, services.url, body)) for body in bodies]
        await asyncio.sleep(1.0)
        services.processes["gateway"].kill()
        assert all(s.error for s in await asyncio.gather(*tasks))
    await settled(services)
    services.start("gateway")
    await asyncio.to_thread(services.ready)


async def test_a_killed_router_is_replaced_by_one_that_knows_what_runs(services: Services) -> None:
    bodies = prompt_bodies(services.model, 16, 100, 400)
    async with aiohttp.ClientSession(headers=services.headers) as session:
        tasks = [asyncio.create_task(stream(session, services.url, body)) for body in bodies]
        await asyncio.sleep(0.7)
        services.processes["router"].kill()
        services.start("router")
        streams = await asyncio.gather(*tasks)
    assert not [s.error for s in streams if s.error]
    await settled(services)


async def test_a_killed_nats_server_costs_a_pause_and_no_request(services: Services) -> None:
    bodies = prompt_bodies(services.model, 16, 100, 300)
    async with aiohttp.ClientSession(headers=services.headers) as session:
        tasks = [asyncio.create_task(stream(session, services.url, body)) for body in bodies]
        await asyncio.sleep(0.7)
        services.processes["nats"].kill()
        await asyncio.sleep(0.5)
        services.start("nats")
        streams = await asyncio.gather(*tasks)
    assert not [s.error for s in streams if s.error]
    await settled(services)


def test_all_members_are_well_at_the_end(services: Services) -> None:
    def ready() -> bool:
        return all(process.child.poll() is None for process in services.processes.values())

    wait_for(ready, 1, "all processes")
