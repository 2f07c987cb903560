"""The kv role's hands: list the storage classes, do what ``kvstore.manager`` orders, tell what is where."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from llmserve.bus.base import Bus
from llmserve.bus.messages import AnyMessage, Heartbeat, KvEvents, KvResync, Tier
from llmserve.kvstore.keys import PageKey, parse_path
from llmserve.kvstore.manager import Manager, Move, MoveKind, TierRules, rules_of
from llmserve.kvstore.notices import Listener, NoticeKind, socket_path
from llmserve.kvstore.stores.base import PageStore, Stored, StoreError
from llmserve.kvstore.stores.breaker import Breaker
from llmserve.kvstore.transfer.pacing import TokenBucket
from llmserve.manifests.schema import Manifest
from llmserve.manifests.sizes import GB, tier_io_bytes_s
from llmserve.workers.kv_feeds import Feeds
from llmserve.workers.kv_lineage import Lineage
from llmserve.workers.kv_metrics import StorageMetrics
from llmserve.workers.kv_uses import Uses
from llmserve.workers.offload.settings import make_stores, meeting_place

logger = logging.getLogger(__name__)

_ROUND_S = 0.2
_RELIST_S = 300.0
_RETRY_LISTING_S = 10.0
_MOVES_AT_ONCE = 4
_ROOT = "v1/"
_TIERS = {"filesystem": Tier.NVME, "s3": Tier.S3}


@dataclass(slots=True)
class _Class:
    """One storage class."""

    store: PageStore
    tier: Tier
    breaker: Breaker
    listed_s: float = -math.inf
    """When it was listed last."""


class PageKeeper:
    """Keeps the pages of one node's folders, and of the cluster's buckets. Belongs to one event loop."""

    def __init__(
        self, manifest: Manifest, bus: Bus | None, member: str, host: str, registry: CollectorRegistry
    ) -> None:
        classes = manifest.spec.storageClasses
        self._manager = Manager(
            [
                TierRules(storage.name, (storage.capacity_gb or math.inf) * GB, storage.prefetch_on_prefix)
                for storage in classes
            ],
            rules_of(manifest),
        )
        stores = make_stores(classes)
        self._classes = [
            _Class(store, _TIERS[storage.type], Breaker()) for store, storage in zip(stores, classes, strict=True)
        ]
        self._bus = bus
        self._feeds = Feeds(member, host)
        self._place = meeting_place(classes)
        rate = tier_io_bytes_s(manifest) or math.inf
        self._bucket = TokenBucket(rate, max(rate / 10, 1.0), time.monotonic())
        self._moves: set[asyncio.Task[None]] = set()
        self._uses = Uses()
        self._lineage = Lineage(self._manager)
        self._prefetching = {storage.name for storage in classes if storage.prefetch_on_prefix}
        self.ready = asyncio.Event()
        """Everything was listed once."""
        self._metrics = StorageMetrics(registry)

    @property
    def manager(self) -> Manager:
        return self._manager

    @property
    def kv_seq(self) -> int:
        """For the heartbeat."""
        return self._feeds.seq

    async def run(self) -> None:
        """Keep the pages until cancelled."""
        listener = self._listen()
        subscriptions = []
        learning = asyncio.create_task(self._lineage.run())
        try:
            if self._bus is not None:
                subjects = self._bus.subjects
                subscriptions = [
                    await self._bus.subscribe(subjects.heartbeats, self._hear),
                    await self._bus.subscribe(subjects.kv_resync(self._feeds.member), self._hear),
                ]
            while True:
                try:
                    await self._round(listener)
                except Exception:
                    # Requests are served without it, and the next round may do better.
                    logger.exception("a round of the kv manager failed")
                await asyncio.sleep(_ROUND_S)
        finally:
            for subscription in subscriptions:
                await subscription.unsubscribe()
            ending = {*self._moves, learning}
            for task in ending:
                task.cancel()
            await asyncio.gather(*ending, return_exceptions=True)
            if listener is not None:
                listener.close()
            for kept in self._classes:
                await kept.store.close()

    def _listen(self) -> Listener | None:
        try:
            return Listener(socket_path(self._place))
        except OSError as error:
            logger.error("workers cannot tell what they do, only listings do: %s", error)
            return None

    async def _round(self, listener: Listener | None) -> None:
        now_s = time.time()
        await asyncio.gather(*(self._list(number) for number in range(len(self._classes))))
        self.ready.set()
        for notice in listener.take() if listener is not None else ():
            key = parse_path(notice.path)
            if self._manager.notice(notice, now_s) and key is not None:
                self._changed(notice.tier, [key], came=notice.kind is NoticeKind.STORED)
            if notice.kind is NoticeKind.USED:
                self._uses.add(notice.tier, notice.path)
        for move in self._manager.due(now_s):
            task = asyncio.create_task(self._carry_out(move))
            self._moves.add(task)
            task.add_done_callback(self._moves.discard)
        if len(self._moves) >= _MOVES_AT_ONCE:
            await asyncio.wait(set(self._moves))
        await self._touch()
        self._publish(self._feeds.flush())
        self._show()

    def _hear(self, message: AnyMessage) -> None:
        if isinstance(message, Heartbeat) and message.fingerprint and message.page_tokens:
            self._feeds.learn(message.fingerprint, message.page_tokens)
        elif isinstance(message, KvResync):
            self._publish(self._feeds.snapshot())

    def _publish(self, messages: Iterable[KvEvents]) -> None:
        if self._bus is not None:
            for message in messages:
                self._bus.publish(self._bus.subjects.kv_events, message)

    def _changed(self, name: str, keys: Iterable[PageKey], *, came: bool) -> None:
        tier = next(kept.tier for kept in self._classes if kept.store.name == name)
        for key in keys:
            # Several folders are one tier to the router.
            elsewhere = any(
                kept.tier is tier and kept.store.name != name and key.path in self._manager.pages(number)
                for number, kept in enumerate(self._classes)
            )
            if not elsewhere:
                self._feeds.change(tier, key, came=came)

    # -- listings -----------------------------------------------------------------------------------------------

    async def _list(self, number: int) -> None:
        kept, now_s = self._classes[number], time.monotonic()
        if now_s - kept.listed_s < _RELIST_S:
            return
        kept.listed_s = now_s
        try:
            found: list[Stored] = []
            async for batch in kept.store.listing(_ROOT):
                found.extend(batch)
        except StoreError as error:
            self._metrics.failures.labels(kept.store.name).inc()
            logger.error("storage class %s cannot be listed: %s", kept.store.name, error)
            kept.listed_s = now_s - _RELIST_S + _RETRY_LISTING_S
            return
        came, gone = self._manager.listed(number, found)
        if kept.store.name in self._prefetching:
            self._lineage.ask(kept.store, came)
        for paths, here in ((came, True), (gone, False)):
            self._changed(kept.store.name, (key for path in paths if (key := parse_path(path))), came=here)
        self._metrics.listing_s.labels(kept.store.name).set(time.monotonic() - now_s)
        logger.info(
            "%s: %d pages, %d new, %d gone, listed in %.2f s",
            kept.store.name,
            len(found),
            len(came),
            len(gone),
            time.monotonic() - now_s,
        )

    async def _touch(self) -> None:
        for name, paths in self._uses.due().items():
            for kept in self._classes:
                if kept.store.name == name:
                    await self._guarded(kept, lambda kept=kept, paths=paths: kept.store.touch(paths))  # type: ignore[misc]

    # -- orders -------------------------------------------------------------------------------------------------

    async def _carry_out(self, move: Move) -> None:
        kept = self._classes[move.tier]
        try:
            done = await self._moved(move, kept)
        except StoreError as error:
            done = False
            logger.warning("%s of %s in %s failed: %s", move.kind.value, move.path, kept.store.name, error)
            if kept.breaker.failed(time.monotonic()):
                logger.error("storage class %s is left alone for a while", kept.store.name)
        if done:
            kept.breaker.succeeded()
            self._metrics.moves.labels(kept.store.name, move.kind.value).inc()
        else:
            self._metrics.failures.labels(kept.store.name).inc()
            self._manager.failed(move)

    async def _moved(self, move: Move, kept: _Class) -> bool:
        """Whether it was done. Raises ``StoreError``."""
        if not kept.breaker.allows(time.monotonic()):
            return False
        if move.kind is MoveKind.PREFETCH and move.tier == 0:
            await kept.store.expect([move.path])
            return True
        if move.kind is not MoveKind.DELETE:
            data = await kept.store.read(move.path)
            if data is None:
                self._gone(move)
                return True
            await self._pace(len(data))
            target = move.tier + (1 if move.kind is MoveKind.DEMOTE else -1)
            if not await self._copied(target, move, data):
                # A page that nothing takes is not kept for it: the tier above would fill up.
                if move.kind is MoveKind.PREFETCH:
                    return False
                logger.warning("%s goes away: %s does not take it", move.path, self._classes[target].store.name)
        if move.kind is not MoveKind.PREFETCH:
            await kept.store.delete([move.path])
            self._gone(move)
        return True

    async def _copied(self, target: int, move: Move, data: bytes) -> bool:
        below, key = self._classes[target], parse_path(move.path)
        assert key is not None

        async def write() -> bool:
            await below.store.write(move.path, data)
            return True

        if not await self._guarded(below, write):
            return False
        # Where it comes to, its idle time begins anew.
        self._manager.stored(target, key, len(data), time.time())
        self._changed(below.store.name, [key], came=True)
        return True

    def _gone(self, move: Move) -> None:
        self._manager.removed(move.tier, move.path)
        if (key := parse_path(move.path)) is not None:
            self._changed(self._classes[move.tier].store.name, [key], came=False)

    async def _guarded(self, kept: _Class, call: Callable[[], Awaitable[object]]) -> bool:
        if not kept.breaker.allows(time.monotonic()):
            return False
        try:
            await call()
        except StoreError as error:
            self._metrics.failures.labels(kept.store.name).inc()
            if kept.breaker.failed(time.monotonic()):
                logger.error("storage class %s is left alone for a while: %s", kept.store.name, error)
            return False
        kept.breaker.succeeded()
        return True

    async def _pace(self, size_bytes: int) -> None:
        while not self._bucket.take(size_bytes, time.monotonic()):
            await asyncio.sleep(self._bucket.wait_s(time.monotonic()) + 1e-4)

    def summary(self) -> str:
        """The classes and their sizes, for people."""
        said = []
        for number, kept in enumerate(self._classes):
            pages = self._manager.pages(number)
            out = ", out of use" if kept.breaker.is_open else ""
            said.append(f"{kept.store.name}: {len(pages)} pages, {pages.total_bytes / 1e6:.1f} MB{out}")
        return "; ".join(said)

    def _show(self) -> None:
        for number, kept in enumerate(self._classes):
            pages = self._manager.pages(number)
            self._metrics.show(kept.store.name, len(pages), pages.total_bytes, out_of_use=kept.breaker.is_open)
