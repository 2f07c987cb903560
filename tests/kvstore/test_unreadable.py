"""Classes that say what they have and cannot yield it, and classes that need long to say what they have."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from llmserve.kvstore import tiers as module
from llmserve.kvstore.pace import LoadPace
from llmserve.kvstore.stores.base import StoreError
from tests.kvstore.test_tiers import SIZE, MemoryStore, World, key

STEP_S = 1.5


def failing(world: World, after_s: float = 0.0) -> Callable[[], None]:
    def fail() -> None:
        world.now_s += after_s
        raise StoreError("it cannot be read")

    return fail


async def ask(world: World, number: int = 1) -> bool:
    """As a request does: load what is said to be there."""
    if not await world.tiers.held([key(number)]):
        return False
    return await world.tiers.load(key(number), np.zeros(SIZE, np.uint8), world.tiers.worthy(1.0))


async def test_a_class_that_knows_its_pages_and_cannot_yield_them_is_left_alone() -> None:
    world, tries = World(), []
    await world.store(1)
    fail = failing(world)
    world.fast.reading = lambda: (tries.append(world.now_s), fail())  # type: ignore[assignment, func-returns-value]
    for _ in range(100):
        assert not await ask(world)
        world.now_s += STEP_S
    # Three in a row, then after pauses of up to 30 s.
    assert len(tries) < 15
    assert world.tiers.take_stats()["fast"].open == 1


async def test_a_class_that_cannot_be_read_is_not_asked_what_it_has() -> None:
    world = World()
    await world.store(1)
    world.fast.reading = failing(world)
    for _ in range(3):
        await ask(world)
    calls = world.fast.calls
    assert await world.tiers.held([key(1)]) == 0
    assert world.fast.calls == calls
    world.fast.reading = lambda: None
    world.now_s += STEP_S
    assert await ask(world)


async def test_a_class_that_cannot_say_what_it_has_is_still_read() -> None:
    world = World()
    await world.store(1)
    world.fast.hangs = True
    for _ in range(5):
        with pytest.MonkeyPatch.context() as quick:
            quick.setattr(module, "LOOK_S", 0.01)
            assert await world.tiers.held([key(2)]) == 0
    assert await world.load(1)


async def test_reads_that_fail_late_now_and_then_make_a_class_slower_than_computing() -> None:
    world = World()
    for number in range(8):
        await world.store(number)
    for number in range(8):
        world.fast.reading = failing(world, 10.0) if number % 2 else lambda: None
        assert await world.load(number) is (number % 2 == 0)
    assert world.tiers.worthy(0.1) == {"slow"}
    world.now_s += 31.0
    assert world.tiers.worthy(0.1) == {"fast", "slow"}


def test_what_a_class_did_before_it_was_left_alone_is_forgotten_when_it_is_tried_again() -> None:
    pace = LoadPace()
    for start_s in (0.0, 10.0, 20.0, 30.0):
        pace.begin(start_s)
        pace.end(start_s + 10.0, loaded=False)
    assert not pace.worth(1.0, 41.0)
    for number in range(4):
        pace.begin(80.0 + number)
        pace.end(80.1 + number, loaded=True)
    assert pace.worth(1.0, 84.0)


class LongStore(MemoryStore):
    """Answers the first question of each look-up, and then no more."""

    def __init__(self) -> None:
        super().__init__("fast")
        self.questions = 0

    async def contains(self, paths: Sequence[str]) -> int:
        self.questions += 1
        if self.questions % 2 == 0:
            await asyncio.sleep(60)
        return len(paths)


async def test_what_a_class_could_say_in_time_counts_and_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_S", 0.05)
    world, store = World(), LongStore()
    world.tiers._classes[0].store = store
    world.tiers._clock = time.monotonic
    keys = [key(number) for number in range(1000)]
    for asked in range(1, 6):
        assert 0 < await world.tiers.held(keys) < 1000
        # It is not asked again by the same request, which has waited long enough.
        assert store.questions == 2 * asked
    stats = world.tiers.take_stats()["fast"]
    assert (stats.failures, stats.open) == (0, 0)
