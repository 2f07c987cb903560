"""An engine that hangs while its worker lives."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from prometheus_client import CollectorRegistry

from llmserve.bus.messages import Failed, Role, Stage
from llmserve.workers import service as module
from llmserve.workers.engine.base import Step, Work
from llmserve.workers.engine.simulated import SimulatedEngine
from llmserve.workers.engine.watched import EngineStalled, Stall, WatchedEngine
from tests.workers.test_service import made, members, world
from tests.workers.test_worker import SLOW
from tests.workers.world import World, body, request, settings, until

__all__ = ["world"]


class HangingEngine(SimulatedEngine):
    """Ends no step while ``hangs``."""

    hangs = False

    async def step(self) -> Step:
        while True:
            if self.hangs:
                await asyncio.sleep(3600)
            try:
                async with asyncio.timeout(0.02):
                    return await super().step()
            except TimeoutError:
                continue


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.floats(0.01, 5.0)), max_size=60))
def test_only_time_with_work_and_without_a_step_counts_and_none_in_which_the_worker_stood_still(
    looks: list[tuple[bool, bool, float]],
) -> None:
    stall, now_s, steps, stalled_s = Stall(0.0), 0.0, 0, 0.0
    for number, (busy, stepped, pause_s) in enumerate(looks):
        steps += stepped
        now_s += pause_s
        stalled_s = stalled_s + min(pause_s, 2.0) if number and busy and not stepped else 0.0
        assert stall.look(busy, steps, now_s, 2.0) == pytest.approx(stalled_s)


async def test_an_engine_without_work_never_hangs_and_one_with_slow_steps_does_not_either() -> None:
    engine = WatchedEngine(SimulatedEngine(settings(timing=SLOW)), stall_s=0.1)
    await engine.start()
    await asyncio.sleep(0.2)
    engine.submit(Work("r.0", Stage.WHOLE, body([1, 2, 3], 20)))
    tokens = 0
    while tokens < 20:
        tokens += sum(len(output.tokens) for output in (await engine.step()).outputs)
    stepping = asyncio.create_task(engine.step())
    await asyncio.sleep(0.2)
    assert not stepping.done()
    stepping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stepping
    await engine.close()


async def test_an_engine_that_hangs_is_called_dead_and_takes_nothing_more() -> None:
    inner = HangingEngine(settings(timing=SLOW))
    engine = WatchedEngine(inner, stall_s=0.2)
    await engine.start()
    inner.hangs = True
    engine.submit(Work("r.0", Stage.WHOLE, body([1, 2, 3], 20)))
    with pytest.raises(EngineStalled, match="hangs: 1 requests"):
        await asyncio.wait_for(engine.step(), 5)
    with pytest.raises(EngineStalled):
        await engine.step()
    with pytest.raises(EngineStalled):
        engine.submit(Work("s.0", Stage.WHOLE, body([1, 2, 3], 20)))
    await engine.close()


async def test_a_worker_reports_what_its_engine_hung_on_as_lost_to_a_death_and_starts_another(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines: list[HangingEngine] = []

    def make(*_: object, **__: object) -> HangingEngine:
        engines.append(HangingEngine(settings(timing=SLOW)))
        return engines[-1]

    registry = CollectorRegistry()
    monkeypatch.setattr(module, "make_engine", make)
    monkeypatch.setattr(module, "BACKOFF_S", (0.01, 0.1))
    service = made(world, registry, restart=True)
    spec = service._manifest.spec
    service._manifest = replace(service._manifest, spec=replace(spec, engine=replace(spec.engine, stall_s=0.3)))
    await service.start()
    running = asyncio.create_task(service.run())
    await until(lambda: members(world))
    worker = service._worker
    assert worker is not None
    await world.grant(worker, request(max_tokens=500))
    await until(lambda: len(world.tokens()) > 3)
    engines[0].hangs = True
    await until(lambda: world.events.of(Failed))
    (failed,) = world.events.of(Failed)
    assert failed.died
    assert "hangs" in failed.error
    await until(lambda: len(members(world)) == 2)
    assert registry.get_sample_value("llmserve_engine_stalls_total", {"worker": "w", "role": Role.BOTH.value}) == 1
    await service.stop()
    await running
