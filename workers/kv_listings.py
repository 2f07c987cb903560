"""Learns what a storage class holds by listing it, while everything else goes on."""

from __future__ import annotations

import asyncio
import logging
import time

from llmserve.kvstore.listings import Listing
from llmserve.kvstore.manager import Manager
from llmserve.kvstore.stores.base import StoreError
from llmserve.workers.kv_classes import KeptClass
from llmserve.workers.kv_lineage import Lineage
from llmserve.workers.kv_metrics import StorageMetrics
from llmserve.workers.kv_news import StorageNews

logger = logging.getLogger(__name__)

_RELIST_S = 300.0
RETRY_LISTING_S = 10.0
_ROOT = "v1/"


class Lister:
    """One class's listings. Belongs to the keeper's event loop."""

    def __init__(
        self, kept: KeptClass, manager: Manager, news: StorageNews, lineage: Lineage, metrics: StorageMetrics
    ) -> None:
        self._kept = kept
        self._manager = manager
        self._news = news
        self._lineage = lineage
        self._metrics = metrics
        self._one_at_a_time = asyncio.Lock()
        self.tried = asyncio.Event()
        """The class was listed once, or could not be."""

    async def list(self) -> float:
        """List the class; the seconds until it is to be listed again."""
        async with self._one_at_a_time:
            listing = self._manager.listing(self._kept.number, time.time())
            try:
                return await self._list(listing)
            finally:
                self._manager.over(listing)
                self.tried.set()

    async def _list(self, listing: Listing) -> float:
        begun_s = time.monotonic()
        try:
            async for batch in self._kept.store.listing(_ROOT):
                listing.add(batch)
        except StoreError as error:
            self._kept.count("listing", error, logging.ERROR)
            return RETRY_LISTING_S
        await asyncio.to_thread(listing.sort)
        came, gone = await self._take_in(listing)
        took_s = time.monotonic() - begun_s
        self._metrics.listing_s.labels(self._kept.name).set(took_s)
        logger.info(
            "%s: %d pages, %d new, %d gone, listed in %.2f s", self._kept.name, listing.total, came, gone, took_s
        )
        return _RELIST_S

    async def _take_in(self, listing: Listing) -> tuple[int, int]:
        """How many pages came and went."""
        number, came, gone = self._kept.number, 0, 0
        for new, old in self._manager.listed(listing):
            came += len(new)
            gone += len(old)
            self._news.came(number, new)
            self._news.went(number, old)
            if self._kept.prefetch:
                self._lineage.ask(self._kept.store, [key.path for key in new])
            # This loop may be the one that serves clients.
            await asyncio.sleep(0)
        return came, gone
