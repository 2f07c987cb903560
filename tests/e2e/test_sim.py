"""The stack on simulated engines: many streams for a while, no error, no growth.

``make soak`` does it for a minute.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.bench.load import closed_loop, prompt_bodies
from tests.malformed import fault_of, malformed
from tests.processes import Stack, manifest_with, metrics, running, total

SECONDS = float(os.environ.get("LLMSERVE_SOAK_S", "12"))
MALFORMED = int(os.environ.get("LLMSERVE_MALFORMED_SIM", "300"))
MANIFEST = {"models.primary.served_name": "smol", "gateway.tool_call_parser": "hermes"}
"""As the bodies of ``tests.malformed`` expect it."""


@pytest.fixture(scope="module")
def sim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder: Path = tmp_path_factory.mktemp("sim")
    stack = Stack(manifest_with("sim.yaml", folder, MANIFEST), folder / "up.log")
    with running(stack):
        yield stack.ready(60)


def resident_mb(stack: Stack) -> float:
    return float(psutil.Process(stack.pid).memory_info().rss / 2**20)


async def all_free(stack: Stack) -> None:
    """Wait until nothing is queued or in flight and no page is used."""
    for _ in range(40):
        await asyncio.sleep(0.25)
        figures = metrics(stack.metrics_url)
        queued = total(figures, "llmserve_queue_depth") + total(figures, "llmserve_tokens_in_flight")
        if queued == 0 and total(figures, "llmserve_kv_pages", state="used") == 0:
            return
    raise AssertionError(f"10 s later {queued} requests or tokens are queued or in flight, or pages are used")


async def test_128_streams_for_a_while_give_no_error_and_no_growth(sim: Stack) -> None:
    bodies = prompt_bodies(sim.model, 64, 32, 64)
    await closed_loop(sim.url, bodies, 128, for_s=SECONDS / 4)
    settled_mb = resident_mb(sim)
    load = await closed_loop(sim.url, bodies, 128, for_s=SECONDS * 3 / 4)
    print(f"\n{len(load.streams)} requests in {load.seconds:.1f} s, {load.requests_per_s:.1f}/s", end="")
    print(f", TTFT p50 {load.ttft_p50_s * 1e3:.0f} ms; RSS {settled_mb:.0f} MB, then {resident_mb(sim):.0f} MB")
    assert not load.errors, load.errors[:3]
    assert all(stream.finish_reason == "length" for stream in load.streams)
    assert (grown_mb := resident_mb(sim) - settled_mb) < 30, f"grown by {grown_mb:.0f} MB from {settled_mb:.0f}"

    await all_free(sim)


async def test_clients_that_leave_free_what_they_held(sim: Stack) -> None:
    bodies = prompt_bodies(sim.model, 32, 32, 1000)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(closed_loop(sim.url, bodies, 32), 2)
    await all_free(sim)


async def test_malformed_bodies_leave_nothing_behind_in_the_whole_stack(sim: Stack) -> None:
    """Eight clients at once, beside streams that go on undisturbed."""
    before = metrics(sim.metrics_url)
    chance = random.Random(0)
    bodies = [malformed(chance) for _ in range(MALFORMED)]
    wrong: list[str] = []

    async def send(client: httpx.AsyncClient, share: int) -> None:
        for asked in bodies[share::8]:
            answer = await client.post(asked.url, content=asked.body, headers={"content-type": "application/json"})
            if fault := fault_of(asked, answer.status_code, answer.text):
                wrong.append(fault)

    streams = asyncio.create_task(closed_loop(sim.url, prompt_bodies(sim.model, 16, 32, 64), 16, for_s=1.0))
    async with httpx.AsyncClient(base_url=sim.url, timeout=30) as client:
        await asyncio.gather(*(send(client, share) for share in range(8)))
    load = await streams
    assert wrong == [], "\n".join(wrong[:20])
    assert not load.errors, load.errors[:3]
    await all_free(sim)
    after = metrics(sim.metrics_url)
    for name in ("llmserve_requests_rejected_total", "llmserve_requests_failed_total"):
        assert total(after, name) == total(before, name), name
