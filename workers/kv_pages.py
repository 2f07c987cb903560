"""The kv role's keeper: lists the storage classes, does what ``kvstore.manager`` orders, tells what is where.

Each class is listed and renewed by tasks of its own, and moves wait for nothing but their turn: a slow bucket keeps
nobody from evicting a disk's pages, and neither of them the event loop, which may be the one that serves clients.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Coroutine
from functools import partial

from prometheus_client import CollectorRegistry

from llmserve.bus.base import Bus
from llmserve.bus.messages import Tier
from llmserve.kvstore.keys import parse_path
from llmserve.kvstore.manager import Manager, TierRules, rules_of
from llmserve.kvstore.notices import Listener, Notice, NoticeKind, socket_path
from llmserve.manifests.schema import Manifest
from llmserve.manifests.sizes import GB, tier_io_bytes_s
from llmserve.workers.kv_classes import KeptClass
from llmserve.workers.kv_feeds import Feeds
from llmserve.workers.kv_lineage import Lineage
from llmserve.workers.kv_listings import RETRY_LISTING_S, Lister
from llmserve.workers.kv_loops import again_and_again
from llmserve.workers.kv_metrics import StorageMetrics
from llmserve.workers.kv_moves import Mover
from llmserve.workers.kv_news import StorageNews
from llmserve.workers.kv_uses import EVERY_S, Uses
from llmserve.workers.offload.settings import make_stores, meeting_place

logger = logging.getLogger(__name__)

_ROUND_S = 0.2
_NOTICES_AT_ONCE = 100
_TIERS = {"filesystem": Tier.NVME, "s3": Tier.S3}


class PageKeeper:
    """Keeps the pages of one node's folders, and of the cluster's buckets. Belongs to one event loop."""

    def __init__(
        self, manifest: Manifest, bus: Bus | None, member: str, host: str, registry: CollectorRegistry
    ) -> None:
        classes = manifest.spec.storageClasses
        self._metrics = StorageMetrics(registry)
        self._manager = Manager(
            [
                TierRules(storage.name, (storage.capacity_gb or math.inf) * GB, storage.prefetch_on_prefix)
                for storage in classes
            ],
            rules_of(manifest),
        )
        self._classes = [
            KeptClass(number, store, _TIERS[storage.type], storage.prefetch_on_prefix, self._metrics)
            for number, (store, storage) in enumerate(zip(make_stores(classes), classes, strict=True))
        ]
        self._numbers = {kept.name: kept.number for kept in self._classes}
        self._place = meeting_place(classes)
        self._news = StorageNews(bus, Feeds(member, host), self._classes, self._manager, self._metrics)
        rate = tier_io_bytes_s(manifest) or math.inf
        self._mover = Mover(self._classes, self._manager, self._news, self._metrics, rate)
        self._uses = Uses(self._classes)
        self._lineage = Lineage(self._manager)
        self._listers = [
            Lister(kept, self._manager, self._news, self._lineage, self._metrics) for kept in self._classes
        ]
        self.ready = asyncio.Event()
        """Everything was listed once, or could not be."""

    @property
    def manager(self) -> Manager:
        return self._manager

    @property
    def kv_seq(self) -> int:
        """For the heartbeat."""
        return self._news.seq

    async def run(self) -> None:
        """Keep the pages until cancelled."""
        listener = self._listen()
        tasks: list[asyncio.Task[None]] = []
        try:
            await self._news.start()
            tasks.extend(asyncio.create_task(loop) for loop in self._loops(listener))
            await asyncio.gather(*tasks)
        finally:
            await self._news.stop()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._mover.stop()
            if listener is not None:
                listener.close()
            for kept in self._classes:
                await kept.store.close()

    def _loops(self, listener: Listener | None) -> list[Coroutine[None, None, None]]:
        metrics = self._metrics
        loops = [
            self._all_listed(),
            again_and_again("round", lambda: self._round(listener), metrics, retry_s=_ROUND_S),
            again_and_again("lineage", self._lineage.learn, metrics, retry_s=_ROUND_S),
        ]
        for lister in self._listers:
            loops.append(again_and_again("listing", lister.list, metrics, retry_s=RETRY_LISTING_S))
        for kept in self._classes:
            loops.append(again_and_again("touch", partial(self._touch, kept), metrics, retry_s=EVERY_S))
        return loops

    async def _all_listed(self) -> None:
        for lister in self._listers:
            await lister.tried.wait()
        self.ready.set()

    def _listen(self) -> Listener | None:
        try:
            return Listener(socket_path(self._place))
        except OSError as error:
            logger.error("workers cannot tell what they do, only listings do: %s", error)
            return None

    async def _round(self, listener: Listener | None) -> float:
        now_s = time.time()
        for number, notice in enumerate(listener.take() if listener is not None else ()):
            self._take(notice, now_s)
            if number % _NOTICES_AT_ONCE == _NOTICES_AT_ONCE - 1:
                await asyncio.sleep(0)
        rooms = {kept.number: room for kept in self._classes if (room := kept.room) is not None}
        for move in self._manager.due(now_s, rooms):
            self._mover.begin(move)
        self._news.flush()
        self._show()
        return _ROUND_S

    def _take(self, notice: Notice, now_s: float) -> None:
        if self._manager.notice(notice, now_s) and (key := parse_path(notice.path)) is not None:
            tell = self._news.came if notice.kind is NoticeKind.STORED else self._news.went
            tell(self._numbers[notice.tier], [key])
        if notice.kind is NoticeKind.USED:
            self._uses.add(notice.tier, notice.path)

    async def _touch(self, kept: KeptClass) -> float:
        await self._uses.tell(kept)
        return EVERY_S

    async def list_again(self) -> None:
        """List all classes now, besides the times at which they are listed anyway."""
        await asyncio.gather(*(lister.list() for lister in self._listers))

    def summary(self) -> str:
        """The classes and their sizes, for people."""
        said = []
        for kept in self._classes:
            pages = self._manager.pages(kept.number)
            out = ", out of use" if kept.breaker.is_open else ""
            said.append(f"{kept.name}: {len(pages)} pages, {pages.total_bytes / 1e6:.1f} MB{out}")
        return "; ".join(said)

    def _show(self) -> None:
        for kept in self._classes:
            pages = self._manager.pages(kept.number)
            self._metrics.show(kept.name, len(pages), pages.total_bytes, out_of_use=kept.breaker.is_open)
