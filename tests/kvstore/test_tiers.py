"""The tiers of a worker over stores that fail in every way: a miss at worst, never a wrong page."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from llmserve.kvstore import tiers as module
from llmserve.kvstore.codec import Codec, PageKind
from llmserve.kvstore.keys import PageKey
from llmserve.kvstore.notices import Listener, Notice, NoticeKind, Notifier, socket_path
from llmserve.kvstore.pace import LoadPace
from llmserve.kvstore.quantize import Bytes
from llmserve.kvstore.stores.base import PageStore, Stored, StoreError
from llmserve.kvstore.tiers import Tiers
from llmserve.kvstore.transfer.pacing import TokenBucket

SIZE = 8192
SECRET = bytes(range(32))


class MemoryStore(PageStore):
    """A store that does as it is told: works, fails, or hangs."""

    shared = False

    def __init__(self, name: str) -> None:
        self.name = name
        self.pages: dict[str, bytes] = {}
        self.fails_reading = False
        self.fails_writing = False
        self.hangs = False
        self.error: Exception = StoreError(f"{name}: told to fail")
        self.calls = 0
        self.reading: Callable[[], None] = lambda: None
        """Called in each read."""

    def _call(self, fails: bool) -> None:
        self.calls += 1
        if fails:
            raise self.error

    async def read(self, path: str) -> bytes | None:
        self._call(self.fails_reading)
        self.reading()
        return self.pages.get(path)

    async def head(self, path: str, size_bytes: int) -> bytes | None:
        raise NotImplementedError

    async def write(self, path: str, data: bytes) -> None:
        self._call(self.fails_writing)
        self.pages[path] = data

    async def contains(self, paths: Sequence[str]) -> int:
        self._call(self.fails_reading)
        if self.hangs:
            await asyncio.sleep(60)
        return next((count for count, path in enumerate(paths) if path not in self.pages), len(paths))

    async def delete(self, paths: Sequence[str]) -> None:
        self._call(self.fails_writing)
        for path in paths:
            self.pages.pop(path, None)

    async def touch(self, paths: Sequence[str]) -> None:
        """Times are not kept."""

    async def listing(self, prefix: str) -> AsyncIterator[list[Stored]]:
        yield [Stored(path, len(data), 0.0) for path, data in self.pages.items()]

    async def close(self) -> None:
        """Nothing to close."""


class World:
    """Tiers over two stores, the fast one and the slow one."""

    def __init__(self, disk: str = "raw", key: bytes | None = None, rate: float = math.inf) -> None:
        self.fast, self.slow = MemoryStore("fast"), MemoryStore("slow")
        self.now_s = 0.0
        self.notices: list[Notice] = []
        self.pool = ThreadPoolExecutor(1)
        self.tiers = Tiers(
            [self.fast, self.slow],
            Codec(PageKind("bf16", SIZE, 64), disk, key),  # type: ignore[arg-type]
            self.pool,
            storing=self.pool,
            bucket=TokenBucket(rate, SIZE, 0.0),
            notify=self.notices.append,
            clock=lambda: self.now_s,
        )

    async def store(self, number: int) -> bool:
        data = await self.tiers.encoded(key(number), page(number), b"")
        return data is not None and await self.tiers.write(key(number), data)

    async def load(self, number: int, space: str = "t-a") -> bool:
        """Whether the page came back; fails if it came back wrong."""
        here = np.zeros(SIZE, np.uint8)
        found = await self.tiers.load(key(number, space), here)
        assert not found or here.tobytes() == page(number).tobytes()
        return found


def key(number: int, space: str = "t-a") -> PageKey:
    return PageKey("f00d" * 4, space, number.to_bytes(32, "big"))


def page(number: int) -> Bytes:
    return np.random.default_rng(number).integers(0, 255, SIZE).astype(np.uint8)


async def test_pages_go_to_the_first_class_and_come_back() -> None:
    world = World()
    assert await world.store(1)
    assert (len(world.fast.pages), len(world.slow.pages)) == (1, 0)
    assert await world.load(1)
    assert not await world.load(2)
    assert [notice.kind for notice in world.notices] == [NoticeKind.STORED, NoticeKind.USED]


async def test_a_page_read_from_the_slow_class_is_in_the_fast_one_afterwards() -> None:
    world = World()
    await world.store(1)
    world.slow.pages, world.fast.pages = world.fast.pages, {}
    assert await world.load(1)
    await asyncio.sleep(0.05)
    assert key(1).path in world.fast.pages
    assert key(1).path in world.slow.pages


async def test_a_prefix_may_lie_in_several_classes() -> None:
    world = World()
    for number in range(4):
        await world.store(number)
    for number in (1, 2):
        world.slow.pages[key(number).path] = world.fast.pages.pop(key(number).path)
    assert await world.tiers.held([key(number) for number in range(6)]) == 4
    assert await world.tiers.held([key(5)]) == 0
    assert await world.tiers.held([]) == 0


async def test_a_damaged_page_is_a_miss_is_deleted_and_the_next_class_is_asked() -> None:
    world = World()
    await world.store(1)
    good = world.fast.pages[key(1).path]
    world.fast.pages[key(1).path] = good[:-1] + bytes([good[-1] ^ 1])
    assert not await world.load(1)
    assert not world.fast.pages
    world.fast.pages[key(1).path] = good[: len(good) // 2]
    world.slow.pages[key(1).path] = good
    assert await world.load(1)
    assert world.tiers.take_stats()["fast"].bad == 2


@pytest.mark.parametrize("secret", [None, SECRET], ids=["plain", "sealed"])
async def test_a_page_of_another_tenant_moved_under_ones_name_is_a_miss(secret: bytes | None) -> None:
    """Whoever can write into the store puts tenant a's page where tenant b's would be."""
    world = World(key=secret)
    await world.store(1)
    world.fast.pages[key(1, "t-b").path] = world.fast.pages[key(1).path]
    assert not await world.load(1, "t-b")
    assert await world.load(1)


async def test_when_the_fast_class_takes_nothing_the_slow_one_does_and_reads_go_on() -> None:
    world = World()
    await world.store(1)
    world.fast.fails_writing = True
    for number in range(2, 8):
        assert await world.store(number)
    assert len(world.slow.pages) == 6
    # The breaker asks a class that fails no more; what is in it is read all the same.
    assert world.fast.calls == 1 + 3
    assert await world.load(1)
    stats = world.tiers.take_stats()
    assert (stats["fast"].failures, stats["fast"].open, stats["slow"].stores) == (3, 1, 6)


UNEXPECTED = [
    RuntimeError("no"),
    KeyError("no"),
    ValueError(),
    EOFError(),
    MemoryError(),
    ExceptionGroup("no", [OSError()]),
]


@pytest.mark.parametrize("error", [StoreError("told to fail"), *UNEXPECTED], ids=repr)
async def test_when_nothing_works_everything_is_a_miss_and_costs_no_calls(error: Exception) -> None:
    world = World()
    await world.store(1)
    for store in (world.fast, world.slow):
        store.fails_reading = store.fails_writing = True
        store.error = error
    for _ in range(20):
        assert not await world.store(2)
        assert not await world.load(1)
        assert await world.tiers.held([key(1)]) == 0
    assert world.fast.calls < 10
    stats = world.tiers.take_stats()["fast"]
    assert (stats.dropped, stats.failures) == (20, world.fast.calls - 1)


@pytest.mark.parametrize("error", UNEXPECTED, ids=repr)
async def test_a_page_that_cannot_be_decoded_or_encoded_is_a_miss_that_is_counted_and_stays(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise error

    world = World()
    await world.store(1)
    with monkeypatch.context() as broken:
        broken.setattr(Codec, "decode", fail)
        broken.setattr(Codec, "encode", fail)
        assert not await world.load(1)
        assert not await world.store(2)
    stats = world.tiers.take_stats()["fast"]
    assert (stats.failures, stats.bad, stats.dropped) == (1, 0, 1)
    assert await world.load(1)


async def test_a_class_that_hangs_is_not_asked_for_ever_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_S", 0.02)
    world = World()
    await world.store(1)
    world.slow.hangs = True
    for _ in range(10):
        assert await world.tiers.held([key(1), key(2)]) == 1
    assert world.slow.calls == 3
    assert world.tiers.take_stats()["slow"].open == 1


async def test_a_class_that_answers_again_is_used_again() -> None:
    world = World()
    await world.store(1)
    world.fast.fails_reading = True
    for _ in range(5):
        assert not await world.load(1)
    world.fast.fails_reading = False
    assert not await world.load(1)
    world.now_s += 2.0
    assert await world.load(1)
    assert world.tiers.take_stats()["fast"].open == 0


async def test_a_class_that_loads_slower_than_the_engine_computes_is_not_read_but_tried_again_later() -> None:
    world, page_s = World(), 0.01

    def slowly() -> None:
        world.now_s += 0.5

    world.slow.reading = slowly
    for number in range(6):
        await world.store(number)
    world.slow.pages, world.fast.pages = world.fast.pages, {}
    here, keys = np.zeros(SIZE, np.uint8), [key(number) for number in range(6)]
    assert await world.tiers.held(keys, page_s) == 6
    for name in keys[:4]:
        assert await world.tiers.load(name, here, world.tiers.worthy(page_s))
    world.fast.pages.clear()
    # The fast class has shown nothing yet, and may be worth it.
    assert world.tiers.worthy(page_s) == {"fast"}
    assert await world.tiers.held(keys, page_s) == 0
    assert not await world.tiers.load(keys[4], here, world.tiers.worthy(page_s))
    # An engine that computes slower still is glad of it.
    assert await world.tiers.held(keys, 1.0) == 6
    world.now_s += 31.0
    assert await world.tiers.held(keys, page_s) == 6


async def test_pages_loaded_side_by_side_take_their_time_once() -> None:
    pace = LoadPace()
    for number in range(8):
        pace.begin(number * 0.001)
    assert sum(pace.end(1.0 + number * 0.1, loaded=True) for number in range(8)) == pytest.approx(1.7)
    assert not pace.worth(0.05, 2.0)
    assert pace.worth(0.3, 2.0)


async def test_all_traffic_keeps_to_the_budget() -> None:
    rate = 40 * SIZE
    world = World(rate=rate)
    begun = time.monotonic()
    world.tiers._clock = time.monotonic
    world.tiers._bucket = TokenBucket(rate, SIZE, begun)
    for number in range(8):
        await world.store(number)
    for number in range(8):
        assert await world.load(number)
    assert time.monotonic() - begun >= (16 - 2) / 40


async def test_notices_reach_the_manager_in_batches_and_none_waits_for_it(tmp_path: Path) -> None:
    place = socket_path(str(tmp_path))
    notifier = Notifier(place)
    notifier.add(Notice(NoticeKind.USED, "disk", "lost"))
    notifier.flush()
    listener = Listener(place)
    sent = [Notice(NoticeKind.STORED, "disk", f"p{number}", number) for number in range(450)]
    for notice in sent:
        notifier.add(notice)
    notifier.flush()
    listener.socket.setblocking(False)
    assert listener.take() == sent
    listener.close()
    notifier.add(sent[0])
    notifier.flush()
    notifier.close()


def test_a_socket_of_a_long_folder_is_elsewhere() -> None:
    assert len(str(socket_path("/" + "x" * 200))) < 100
    assert socket_path("/" + "x" * 200) != socket_path("/" + "y" * 200)
    assert socket_path("bucket") != socket_path("other")
