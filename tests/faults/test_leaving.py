"""What ends in order: a worker on SIGTERM, clients that go away, and requests that kill whoever runs them."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress

import aiohttp
import pytest

from llmserve.bus.messages import Heartbeat, Role
from tests.bench.load import prompt_bodies, stream
from tests.faults.load import asked, prompt, require_exact, require_once
from tests.faults.observer import Observer
from tests.services import Services
from tests.sim_gateway import SimGateway

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_worker_hands_over_at_its_drain_deadline_what_it_could_not_finish_and_exits_with_0(
    services: Services, observer: Observer, gateway: SimGateway, role: str
) -> None:
    name = f"{role}-leaving"
    leaving = services.start(name, role, "--drain-s", "0.3")
    await asyncio.to_thread(leaving.wait_for_line, "ready after", 30)
    asking = asyncio.create_task(asked(gateway, 40, 200, over_s=1.0))
    await asyncio.sleep(0.7)
    assert await asyncio.to_thread(leaving.stop, 20) == 0
    del services.processes[name]
    require_exact(await asking)
    await require_once(observer, {gateway.member})
    assert not [answer for answer in gateway.answers if answer.error]


async def test_clients_that_leave_at_any_stage_leave_nothing_behind(services: Services, observer: Observer) -> None:
    # 32 decode slots: of so many some are queued, some prefill, some wait for a decode worker, and some decode.
    rng = random.Random(3)
    bodies = prompt_bodies(services.model, 90, 1200, 600)

    async def client(session: aiohttp.ClientSession, body: dict[str, object]) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(rng.uniform(0.02, 1.5)):
                await stream(session, services.url, body)

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(headers=services.headers, connector=connector) as session:
        await asyncio.gather(*(client(session, body) for body in bodies))
    await observer.settled(15)


@pytest.mark.parametrize("failover", [False, True])
async def test_a_request_that_kills_whoever_runs_it_is_failed_and_the_others_are_not(
    services: Services, observer: Observer, gateway: SimGateway, failover: bool
) -> None:
    """``failover``: the leading router dies together with the first victim, and its successor goes on counting."""
    leader = await observer.leader()
    poison = prompt(999, tokens=77)
    killed: list[str] = []

    def kill_who_runs_it(beat: Heartbeat) -> None:
        requests = {seq: item.request for seq, item in observer.seen.items()}
        of = {one.request_id for one in requests.values() if one.attempt == 0 and one.prompt_tokens == len(poison)}
        seqs = {seq for seq, one in requests.items() if one.request_id in of}
        if beat.role is not Role.DECODE or not seqs & {line.seq for line in beat.running}:
            return
        for name, process in list(services.processes.items()):
            if process.pid == beat.pid and process.child.poll() is None:
                process.kill()
                if failover and not killed:
                    services.processes[leader].kill()
                    services.start(leader, "router")
                killed.append(name)
                services.start(name, "decode")

    observer.on_beat = kill_who_runs_it
    others = asyncio.create_task(asked(gateway, 30, 150, over_s=2.0))
    await asyncio.sleep(0.5)
    answer = await asyncio.wait_for(gateway.ask(poison, 1500), 60)
    observer.on_beat = None
    assert answer.code == "poison", (answer, killed)
    assert "workers that ran it" in answer.error
    # Two deaths tell, unless others were there at both: these are tried apart, and the third death tells.
    assert 2 <= len(killed) <= 3
    require_exact(await others)


async def test_everything_is_given_back_at_the_end(observer: Observer) -> None:
    await observer.settled(15)
