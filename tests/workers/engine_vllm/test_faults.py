"""Engines that are stopped, killed, or fail."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import psutil
import pytest

from llmserve.bus.messages import Role, Stage
from llmserve.workers.engine.base import EngineDied, Work
from llmserve.workers.engine.vllm_core import Pages
from llmserve.workers.engine.vllm_thread import ThreadCore
from llmserve.workers.engine.watched import EngineStalled, WatchedEngine
from tests.workers.engine_vllm.driver import Driver, Pair, body, engine_processes

pytestmark = [pytest.mark.vllm, pytest.mark.faults]
Prompt = Callable[..., list[int]]


class Victim:
    """A prefill engine in a process of its own that may be stopped and killed."""

    def __init__(self, driver: Driver, process: psutil.Process) -> None:
        self.driver = driver
        self.process = process


@pytest.fixture(scope="module")
async def victim(pair: Pair) -> AsyncIterator[Victim]:
    before = engine_processes()
    driver = await Driver.open(Role.PREFILL, "process", lease_s=60.0)
    (process,) = engine_processes() - before
    yield Victim(driver, process)
    await driver.close()


async def test_the_pages_of_a_producer_that_hangs_on_the_same_host_are_read_all_the_same(
    pair: Pair, victim: Victim, prompt: Prompt
) -> None:
    data = body(prompt(500))
    reference = await pair.whole(data)
    first = await victim.driver.run(Stage.PREFILL, data)
    pair.decode.moved.clear()
    victim.process.send_signal(signal.SIGSTOP)
    try:
        rest = await pair.decoded(data, first)
    finally:
        victim.process.send_signal(signal.SIGCONT)
    assert [(m.engine, m.failure) for m in pair.decode.moved] == [("same_host", "")]
    assert first.tokens + rest.tokens == reference
    await victim.driver.all_free()


async def test_an_engine_whose_process_is_stopped_is_called_dead_only_while_it_has_work(
    victim: Victim, prompt: Prompt
) -> None:
    watched = WatchedEngine(victim.driver.engine, stall_s=2.0)
    watched.submit(Work("stopped.0", Stage.WHOLE, body(prompt(300), 1000)))
    await victim.driver.until(lambda: victim.driver._outputs["stopped.0"], "it runs")
    watching = asyncio.create_task(watched._watch())
    victim.process.send_signal(signal.SIGSTOP)
    try:
        began_s = time.monotonic()
        await asyncio.wait_for(watching, 20)
        assert time.monotonic() - began_s > 1.5
        with pytest.raises(EngineStalled, match="no step has ended for 2 s"):
            await watched.step()
    finally:
        victim.process.send_signal(signal.SIGCONT)
    victim.driver.engine.abort(["stopped.0"])
    # Without work it does not step, and is not called dead for that.
    idle = asyncio.create_task(WatchedEngine(victim.driver.engine, stall_s=0.5)._watch())
    await asyncio.sleep(1.0)
    assert not idle.done()
    idle.cancel()
    await victim.driver.all_free()


async def test_a_producer_killed_before_the_read_costs_a_recompute_and_its_engine_says_that_it_died(
    pair: Pair, victim: Victim, prompt: Prompt
) -> None:
    data = body(prompt(500))
    reference = await pair.whole(data)
    first = await victim.driver.run(Stage.PREFILL, data)
    victim.process.kill()
    pair.decode.moved.clear()
    rest = await pair.decoded(data, first)
    assert first.tokens + rest.tokens == reference
    assert rest.first.computed_tokens == 500
    assert {m.failure for m in pair.decode.moved} <= {"peer", "timeout"}
    await victim.driver.until(lambda: isinstance(victim.driver.died, EngineDied), "the death is noticed")
    with pytest.raises(EngineDied):
        victim.driver.submit(Stage.PREFILL, data)
    await pair.decode.all_free()


class BrokenCore:
    """As much of vLLM's ``EngineCore`` as the thread steps; its first step fails."""

    batch_queue = None

    class scheduler:
        @staticmethod
        def has_requests() -> bool:
            return True

    def step_fn(self) -> Any:
        raise RuntimeError("the device is gone")

    def shutdown(self) -> None: ...


async def test_a_failure_in_the_thread_is_passed_on_and_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: asyncio.Queue[Any] = asyncio.Queue()
    monkeypatch.setattr(ThreadCore, "_create", lambda self: (BrokenCore(), Pages(1, 1, 1, "")))
    core = ThreadCore(config=None, threads=1)
    await core.start(heard.put_nowait)
    async with asyncio.timeout(10):
        error = await heard.get()
    await core.close()
    assert str(error) == "the device is gone"
    assert heard.empty()
