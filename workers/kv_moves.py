"""Carries out what ``kvstore.manager`` orders: pages move down, up, and away, a few at a time."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

from llmserve.kvstore.keys import parse_path
from llmserve.kvstore.manager import Manager, Move, MoveKind
from llmserve.kvstore.transfer.pacing import TokenBucket
from llmserve.workers.kv_classes import KeptClass
from llmserve.workers.kv_metrics import StorageMetrics
from llmserve.workers.kv_news import StorageNews

logger = logging.getLogger(__name__)

PAGES_AT_ONCE = 4
"""Pages in memory at once, of all classes together."""
_ORDERS_AT_ONCE = 4
"""Of each class; as many prefetches besides, which do not wait for evictions."""
_PREFETCHES_WAITING = 1000
"""More would come too late."""


class Mover:
    """Belongs to the keeper's event loop, and never makes it wait."""

    def __init__(
        self,
        classes: Sequence[KeptClass],
        manager: Manager,
        news: StorageNews,
        metrics: StorageMetrics,
        rate_bytes_s: float,
    ) -> None:
        self._classes = classes
        self._manager = manager
        self._news = news
        self._metrics = metrics
        self._bucket = TokenBucket(rate_bytes_s, max(rate_bytes_s / 10, 1.0), time.monotonic())
        self._pages = asyncio.Semaphore(PAGES_AT_ONCE)
        self._evictions = [asyncio.Semaphore(_ORDERS_AT_ONCE) for _ in classes]
        self._prefetches = [asyncio.Semaphore(_ORDERS_AT_ONCE) for _ in classes]
        self._waiting = 0
        """Prefetches that are not done."""
        self._moves: set[asyncio.Task[None]] = set()

    def begin(self, move: Move) -> None:
        """Carry out the order as soon as there is room."""
        prefetch = move.kind is MoveKind.PREFETCH
        if prefetch and self._waiting >= _PREFETCHES_WAITING:
            self._metrics.failures.labels(self._classes[move.tier].name).inc()
            logger.debug("%s is not prefetched: too many wait", move.path)
            return
        self._waiting += prefetch
        task = asyncio.create_task(self._in_turn(move))
        self._moves.add(task)
        task.add_done_callback(self._moves.discard)

    async def stop(self) -> None:
        """Leave off where it is: no page is lost by it."""
        for task in self._moves:
            task.cancel()
        await asyncio.gather(*self._moves, return_exceptions=True)

    async def _in_turn(self, move: Move) -> None:
        prefetch = move.kind is MoveKind.PREFETCH
        try:
            async with (self._prefetches if prefetch else self._evictions)[move.tier]:
                await self._carry_out(move)
        finally:
            self._waiting -= prefetch

    async def _carry_out(self, move: Move) -> None:
        kept = self._classes[move.tier]
        if not kept.allows():
            self._manager.put_back(move)
            return
        try:
            done = await self._moved(move, kept)
        except Exception as error:
            kept.failed(f"{move.kind.value} of {move.path}", error)
            self._manager.failed(move, time.time())
            return
        kept.breaker.succeeded()
        if done:
            self._metrics.moves.labels(kept.name, move.kind.value).inc()
        else:
            self._metrics.failures.labels(kept.name).inc()

    async def _moved(self, move: Move, kept: KeptClass) -> bool:
        """False if the class above does not take a page. Raises ``StoreError``."""
        if move.kind is MoveKind.PREFETCH:
            if move.tier:
                return await self._copied(move, kept, move.tier - 1)
            await kept.store.expect([move.path])
            return True
        if move.kind is MoveKind.DEMOTE and not await self._copied(move, kept, move.tier + 1):
            # A page that nothing takes is not kept for it: the tier above would fill up.
            logger.warning("%s goes away: %s does not take it", move.path, self._classes[move.tier + 1].name)
        await kept.store.delete([move.path])
        self._gone(move)
        return True

    async def _copied(self, move: Move, kept: KeptClass, target: int) -> bool:
        """Whether the page is in ``target`` now, or nowhere any more. Raises ``StoreError``."""
        async with self._pages:
            data = await kept.store.read(move.path)
            if data is None:
                self._gone(move)
                return True
            await self._pace(len(data))
            return await self._written(move.path, data, self._classes[target])

    async def _written(self, path: str, data: bytes, target: KeptClass) -> bool:
        if not await target.guarded(f"writing of {path}", lambda: target.store.write(path, data)):
            return False
        key = parse_path(path)
        assert key is not None
        # Where it comes to, its idle time begins anew.
        self._manager.stored(target.number, key, len(data), time.time())
        self._news.came(target.number, [key])
        return True

    def _gone(self, move: Move) -> None:
        self._manager.removed(move.tier, move.path)
        if (key := parse_path(move.path)) is not None:
            self._news.went(move.tier, [key])

    async def _pace(self, size_bytes: int) -> None:
        while not self._bucket.take(size_bytes, time.monotonic()):
            await asyncio.sleep(self._bucket.wait_s(time.monotonic()) + 1e-4)
