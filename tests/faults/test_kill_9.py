"""``kill -9`` of workers and the nats-server under load, a worker that hangs: nothing differs or stays held."""

from __future__ import annotations

import asyncio
import signal

import pytest

from tests.bench.load import prompt_bodies
from tests.faults.load import answers, asked, prompt, require_exact, require_once
from tests.faults.observer import Observer
from tests.services import Services
from tests.sim_gateway import SimGateway

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("victim", ["prefill-2", "decode-2"])
async def test_every_stream_ends_as_if_no_worker_had_died(services: Services, victim: str) -> None:
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


async def test_a_decode_worker_that_stands_still_amid_streams_is_replaced_and_harms_nobody_when_it_wakes(
    services: Services, gateway: SimGateway
) -> None:
    running = asyncio.create_task(asked(gateway, 24, 250, over_s=1.0))
    await asyncio.sleep(1.2)
    hung = services.processes["decode-2"].child
    hung.send_signal(signal.SIGSTOP)
    ended = await running
    hung.send_signal(signal.SIGCONT)
    require_exact(ended)
    # Three seconds of silence, and its turn elsewhere.
    assert max(answer.longest_pause_s for answer in ended) > 2
    assert max(answer.longest_pause_s for answer in ended) < 10
    # What it did before it slept is heard now, and tells nobody anything new.
    require_exact(await asked(gateway, 24, 50))
    require_exact(ended)


@pytest.mark.parametrize("away_s", [0.5, 6.0])
async def test_a_killed_nats_server_costs_a_pause_and_no_request(
    services: Services, observer: Observer, gateway: SimGateway, away_s: float
) -> None:
    """Six seconds: longer than any silence after which a member is gone."""
    asking = asyncio.create_task(asked(gateway, 30, 150, over_s=1.5))
    running = asyncio.create_task(answers(services, prompt_bodies(services.model, 16, 100, 300)))
    await asyncio.sleep(0.8)
    services.processes["nats"].kill()
    waiting = asyncio.create_task(gateway.ask(prompt(500), 20))
    await asyncio.sleep(away_s)
    services.start("nats")
    assert not [s.error for s in await running if s.error]
    require_exact([*await asking, await waiting])
    await require_once(observer, {gateway.member})


async def test_all_members_are_well_at_the_end_and_everything_is_given_back(
    services: Services, observer: Observer
) -> None:
    assert all(process.child.poll() is None for process in services.processes.values())
    await observer.settled(13)
