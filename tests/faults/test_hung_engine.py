"""vLLM's own engine core hangs under ``llmserve up``: what it was writing goes on elsewhere, to the letter."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator

import aiohttp
import psutil
import pytest

from tests.bench.load import Stream, prompt_bodies, stream
from tests.processes import Stack, manifest_with, metrics, running, total

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.faults,
    pytest.mark.skipif("LLMSERVE_HUNG_ENGINE" not in os.environ, reason="set LLMSERVE_HUNG_ENGINE=1: 2 minutes"),
]

STREAMS, TOKENS = 4, 120
STALL_S = 10.0
"""More than a step of so few tokens takes on a busy machine."""


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """In fp32, whose greedy output does not depend on which requests share a batch."""
    folder = tmp_path_factory.mktemp("hung")
    changes: dict[str, object] = {
        "engine.stall_s": STALL_S,
        "engine.kv_space_gb": 0.25,
        "models.primary.dtype": "fp32",
        "deployment.replicas": {"prefill": 1, "decode": 2},
    }
    stack = Stack(manifest_with("local.yaml", folder, changes), folder / "up.log")
    with running(stack):
        yield stack.ready()


async def streams(up: Stack) -> list[Stream]:
    timeout = aiohttp.ClientTimeout(total=200)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        bodies = prompt_bodies(up.model, STREAMS, 60, TOKENS)
        return await asyncio.gather(*(stream(session, up.url, body) for body in bodies))


def counted(up: Stack, name: str) -> float:
    return total(metrics(up.metrics_url), name)


async def busiest_core(up: Stack) -> psutil.Process:
    """The one that decodes most."""
    cores = [process for process in up.family() if "EngineCore" in process.name()]
    assert len(cores) == 3
    before_s = {core: sum(core.cpu_times()[:2]) for core in cores}
    await asyncio.sleep(0.5)
    return max(cores, key=lambda core: sum(core.cpu_times()[:2]) - before_s[core])


async def test_streams_of_a_stopped_engine_core_go_on_elsewhere_with_the_same_text_and_another_takes_its_place(
    up: Stack,
) -> None:
    undisturbed = await streams(up)
    assert not [s.error for s in undisturbed if s.error]
    before = counted(up, "llmserve_decode_tokens_total")
    again = asyncio.create_task(streams(up))
    async with asyncio.timeout(60):
        while counted(up, "llmserve_decode_tokens_total") - before < STREAMS * TOKENS / 6:
            await asyncio.sleep(0.05)
    stopped = await busiest_core(up)
    assert not again.done()
    stopped.send_signal(signal.SIGSTOP)
    disturbed = await again
    assert [(s.error, s.finish_reason) for s in disturbed] == [("", "length")] * STREAMS
    assert [s.text for s in disturbed] == [s.text for s in undisturbed]
    assert max(s.longest_pause_s for s in disturbed) > STALL_S / 2
    assert counted(up, "llmserve_engine_stalls_total") == 1
    async with asyncio.timeout(60):
        while not counted(up, "llmserve_engine_restarts_total"):
            await asyncio.sleep(0.1)
    assert not stopped.is_running()
    assert counted(up, "llmserve_attempts_lost_total") >= 1
    assert [s.text for s in await streams(up)] == [s.text for s in undisturbed]
