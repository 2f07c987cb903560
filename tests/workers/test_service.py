"""A replica outlives its engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from llmserve.bus.messages import Heartbeat, Role
from llmserve.manifests.loader import load
from llmserve.workers import service as module
from llmserve.workers.engine.base import EngineError
from llmserve.workers.metrics import WorkerMetrics
from llmserve.workers.service import WorkerService
from llmserve.workers.worker import WorkerDied
from tests.processes import ROOT
from tests.workers.test_worker import MortalEngine
from tests.workers.world import World, settings, until


class Engines:
    """Makes engines in place of the factory; those whose number is in ``broken`` do not start."""

    def __init__(self, broken: set[int]) -> None:
        self.made: list[MortalEngine] = []
        self.tries = 0
        self.broken = broken

    def __call__(self, *_: object, **__: object) -> MortalEngine:
        self.tries += 1
        if self.tries in self.broken:
            raise EngineError("no memory")
        self.made.append(MortalEngine(settings()))
        return self.made[-1]


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    await world.open()
    yield world
    await world.close()


def made(world: World, registry: CollectorRegistry, *, restart: bool, name: str = "w") -> WorkerService:
    manifest = load(Path(ROOT) / "manifests" / "sim.yaml")
    return WorkerService(manifest, Role.BOTH, world.broker.bus(name), name, WorkerMetrics(registry), restart=restart)


def members(world: World) -> set[str]:
    return {beat.member for beat in world.beats.of(Heartbeat) if not beat.leaving}


async def test_a_dead_engine_is_started_again_as_another_member_even_if_that_takes_two_tries(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines, registry = Engines(broken={2}), CollectorRegistry()
    monkeypatch.setattr(module, "make_engine", engines)
    monkeypatch.setattr(module, "BACKOFF_S", (0.01, 0.1))
    service = made(world, registry, restart=True)
    await service.start()
    running = asyncio.create_task(service.run())
    await until(lambda: len(members(world)) == 1)
    engines.made[0].death.set()
    await until(lambda: len(members(world)) == 2)
    assert sum(beat.leaving for beat in world.beats.of(Heartbeat)) == 1
    assert service.alive
    labels = {"worker": "w", "role": "both"}
    await until(lambda: registry.get_sample_value("llmserve_engine_restarts_total", labels) == 1)
    await service.stop(drain_s=1)
    await running
    assert not service.alive


async def test_a_worker_that_is_not_to_restart_ends_with_its_engine(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = Engines(broken=set())
    monkeypatch.setattr(module, "make_engine", engines)
    service = made(world, CollectorRegistry(), restart=False)
    await service.start()
    engines.made[0].death.set()
    with pytest.raises(WorkerDied):
        await asyncio.wait_for(service.run(), 5)


async def test_an_engine_that_does_not_start_at_first_is_an_error(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "make_engine", Engines(broken={1}))
    with pytest.raises(EngineError, match="no memory"):
        await made(world, CollectorRegistry(), restart=True).start()
    assert not members(world)


@pytest.mark.parametrize("name", ["", "a.b", "x" * 51])
def test_a_name_that_cannot_stand_in_a_subject_is_refused(world: World, name: str) -> None:
    with pytest.raises(ValueError, match="letters"):
        made(world, CollectorRegistry(), restart=True, name=name)
