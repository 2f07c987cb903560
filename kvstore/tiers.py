"""The tiers below DRAM: pages encoded, in storage classes from the fastest to the slowest.

A page is written to the first class that takes it, and read from the first one that has it; read from a slower class
it is written to the first one too. Where pages go later is the kv manager's business (``kvstore.manager``).

Nothing here fails: a page that cannot be read is a miss, one that cannot be written is dropped, and both are counted.
Behind circuit breakers a class that fails is left alone: look-ups, reads and writes apart, since a read-only disk
still reads, and an object store may know what it has and not yield it. A class that is not to be read is not asked.
One that loads a page slower than the engine computes it is not read.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import TypeVar

from llmserve.kvstore.codec import BadPage, Codec
from llmserve.kvstore.keys import PageKey
from llmserve.kvstore.notices import Notice, NoticeKind
from llmserve.kvstore.pace import LoadPace
from llmserve.kvstore.quantize import Bytes
from llmserve.kvstore.stores.base import PageStore, StoreError
from llmserve.kvstore.stores.breaker import Breaker
from llmserve.kvstore.transfer.pacing import TokenBucket

logger = logging.getLogger("vllm.llmserve.tiers")
"""Below ``vllm``, whose logger is the one that engine processes configure."""

T = TypeVar("T")

LOOK_S = 1.0
"""For a class to say which pages of a prefix it has: a request waits for it. What it has said by then counts."""


@dataclass(slots=True)
class TierStats:
    """What happened at one class since the last look."""

    loads: int = 0
    load_bytes: int = 0
    """Of stored, encoded pages."""
    load_s: float = 0.0
    """In which pages were loaded; loads that overlap count once."""
    stores: int = 0
    store_bytes: int = 0
    store_s: float = 0.0
    dropped: int = 0
    """Pages that were not written: too much to do, or the class did not take them."""
    bad: int = 0
    """Pages whose checksum, seal or header was wrong; they are deleted."""
    failures: int = 0
    """Calls that the class refused, or did not answer in time."""
    open: int = 0
    """1 while a breaker keeps the class out of use."""


@dataclass(slots=True, eq=False)
class _Class:
    store: PageStore
    looks: Breaker = field(default_factory=Breaker)
    """Apart from reads: a class may say at once what it has, and hang when it is to yield it."""
    reads: Breaker = field(default_factory=Breaker)
    writes: Breaker = field(default_factory=Breaker)
    stats: TierStats = field(default_factory=TierStats)
    pace: LoadPace = field(default_factory=LoadPace)


class Tiers:
    """All storage classes of a worker. Belongs to one event loop; decoding runs in ``loading``, encoding in
    ``storing``."""

    def __init__(
        self,
        stores: Sequence[PageStore],
        codec: Codec,
        loading: Executor,
        *,
        storing: Executor,
        bucket: TokenBucket,
        notify: Callable[[Notice], None] = lambda notice: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._classes = [_Class(store) for store in stores]
        self._codec = codec
        self._loading = loading
        self._storing = storing
        self._behind: set[asyncio.Task[bool]] = set()
        self._bucket = bucket
        self._notify = notify
        self._clock = clock

    def worthy(self, compute_s: float) -> frozenset[str]:
        """Classes that can be read, and load a page no slower than the ``compute_s`` in which it is computed; may be
        asked from any thread."""
        now_s = self._clock()
        return frozenset(
            tier.store.name
            for tier in self._classes
            if tier.reads.would_allow(now_s) and tier.pace.worth(compute_s, now_s)
        )

    async def held(self, keys: Sequence[PageKey], compute_s: float = math.inf) -> int:
        """How many of ``keys``, which follow each other in a prefix, the classes hold without a gap. Classes that
        cannot be read, or take longer than ``compute_s`` for a page, are not asked."""
        paths = [key.path for key in keys]
        names = self.worthy(compute_s)
        left_s = {tier: LOOK_S for tier in self._classes if tier.store.name in names}
        count = 0
        advanced = True
        while advanced and count < len(paths):
            advanced = False
            for tier in left_s:
                # What is left after half of it is no time to answer in, and would only count as a failure.
                if count == len(paths) or left_s[tier] < LOOK_S / 2:
                    continue
                begun_s = self._clock()
                more = await self._contains(tier, paths[count:], left_s[tier])
                left_s[tier] -= self._clock() - begun_s
                count += more
                advanced = advanced or more > 0
        return count

    async def has(self, key: PageKey) -> bool:
        """Whether the page is in the first class already: another worker may have written it."""
        return bool(self._classes) and await self._contains(self._classes[0], [key.path], LOOK_S) == 1

    async def _contains(self, tier: _Class, paths: Sequence[str], within_s: float) -> int:
        return await self._guarded(tier, tier.looks, lambda: tier.store.contains_within(paths, within_s)) or 0

    async def load(self, key: PageKey, page: Bytes, among: frozenset[str] | None = None) -> bool:
        """Fill ``page``; False if no class, of those ``among`` if given, has it whole, and then ``page`` may hold
        anything."""
        path = key.path
        for position, tier in enumerate(self._classes):
            if among is not None and tier.store.name not in among:
                continue
            data = await self._loaded(tier, key, page)
            if data is None:
                continue
            tier.stats.loads += 1
            tier.stats.load_bytes += len(data)
            self._notify(Notice(NoticeKind.USED, tier.store.name, path))
            if position:
                writing = asyncio.create_task(self.write(key, data, upto=position))
                self._behind.add(writing)
                writing.add_done_callback(self._behind.discard)
            return True
        return False

    async def _loaded(self, tier: _Class, key: PageKey, page: Bytes) -> bytes | None:
        """What was decoded into ``page``."""
        loaded: bool | None = None

        async def read() -> bytes | None:
            nonlocal loaded
            loaded = False
            data = await tier.store.read(key.path)
            loaded = None
            return data

        tier.pace.begin(self._clock())
        try:
            data = await self._guarded(tier, tier.reads, read)
            if data is None:
                return None
            await self._pace(len(data))
            if not await self._decoded(tier, key, data, page):
                return None
            loaded = True
            return data
        finally:
            tier.stats.load_s += tier.pace.end(self._clock(), loaded=loaded)

    async def _decoded(self, tier: _Class, key: PageKey, data: bytes, page: Bytes) -> bool:
        try:
            await _in(self._loading, lambda: self._codec.decode(key, data, page))
        except BadPage as problem:
            tier.stats.bad += 1
            logger.warning("page %s in %s is dropped: %s", key.path, tier.store.name, problem)
            await self._guarded(tier, tier.writes, lambda: tier.store.delete([key.path]))
            self._notify(Notice(NoticeKind.REMOVED, tier.store.name, key.path))
            return False
        except Exception:
            tier.stats.failures += 1
            logger.exception("page %s of %s cannot be decoded", key.path, tier.store.name)
            return False
        return True

    @property
    def most_bytes(self) -> int:
        """Of an encoded page."""
        return self._codec.most_bytes

    async def encoded(self, key: PageKey, page: Bytes, parent: bytes) -> bytes | None:
        """The bytes to be written for ``page``, which may change once they are here; None if it is dropped."""
        try:
            return await _in(self._storing, lambda: self._codec.encode(key, page, parent))
        except Exception:
            logger.exception("page %s cannot be encoded", key.path)
            self.drop()
            return None

    async def write(self, key: PageKey, data: bytes, *, upto: int | None = None, parent: bytes = b"") -> bool:
        """Write an encoded page to the first class, of the first ``upto``, that takes it."""
        await self._pace(len(data))
        for tier in self._classes[:upto]:
            begun_s = self._clock()
            if await self._wrote(tier, key.path, data):
                tier.stats.stores += 1
                tier.stats.store_bytes += len(data)
                tier.stats.store_s += self._clock() - begun_s
                self._notify(Notice(NoticeKind.STORED, tier.store.name, key.path, len(data), parent))
                return True
        self.drop()
        return False

    async def _wrote(self, tier: _Class, path: str, data: bytes) -> bool:
        async def call() -> bool:
            await tier.store.write(path, data)
            return True

        return bool(await self._guarded(tier, tier.writes, call))

    def drop(self, pages: int = 1) -> None:
        """Count pages that are not written."""
        if self._classes:
            self._classes[0].stats.dropped += pages

    def take_stats(self) -> dict[str, TierStats]:
        """By class, since the last call."""
        taken = {}
        for tier in self._classes:
            taken[tier.store.name], tier.stats = tier.stats, TierStats()
            taken[tier.store.name].open = int(tier.looks.is_open or tier.reads.is_open or tier.writes.is_open)
        return taken

    async def close(self) -> None:
        """Never raises."""
        for writing in self._behind:
            writing.cancel()
        await asyncio.gather(*self._behind, return_exceptions=True)
        for tier in self._classes:
            await tier.store.close()

    async def _pace(self, size_bytes: int) -> None:
        while not self._bucket.take(size_bytes, self._clock()):
            await asyncio.sleep(self._bucket.wait_s(self._clock()) + 1e-4)

    async def _guarded(self, tier: _Class, breaker: Breaker, call: Callable[[], Awaitable[T]]) -> T | None:
        """The call's result; None if it failed, or is not made because calls like it keep failing."""
        if not breaker.allows(self._clock()):
            return None
        try:
            result = await call()
        except Exception as error:
            tier.stats.failures += 1
            if not isinstance(error, StoreError):
                # Not what stores say of themselves: a defect, here or in a library.
                logger.exception("storage class %s failed in a way of its own", tier.store.name)
            if breaker.failed(self._clock()):
                logger.error("storage class %s is left alone for a while: %s", tier.store.name, error)
            return None
        if breaker.is_open:
            logger.warning("storage class %s answers again", tier.store.name)
        breaker.succeeded()
        return result


async def _in(executor: Executor, call: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(executor, call)
