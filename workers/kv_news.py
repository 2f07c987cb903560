"""Tells the router which pages the storage classes hold: changes with each round, everything when it asks."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from llmserve.bus.base import Bus, BusError, Subscription
from llmserve.bus.messages import AnyMessage, Heartbeat, KvEvents, KvResync
from llmserve.kvstore.keys import PageKey
from llmserve.kvstore.manager import Manager
from llmserve.workers.kv_classes import KeptClass
from llmserve.workers.kv_feeds import Feeds
from llmserve.workers.kv_metrics import StorageMetrics

logger = logging.getLogger(__name__)


class StorageNews:
    """Belongs to the keeper's event loop. Without a bus it is only kept."""

    def __init__(
        self, bus: Bus | None, feeds: Feeds, classes: Sequence[KeptClass], manager: Manager, metrics: StorageMetrics
    ) -> None:
        self._bus = bus
        self._feeds = feeds
        self._classes = classes
        self._manager = manager
        self._metrics = metrics
        self._subscriptions: list[Subscription] = []

    @property
    def seq(self) -> int:
        """Of the last message."""
        return self._feeds.seq

    async def start(self) -> None:
        """Hear of engines, and of routers that missed something. Raises ``BusError``."""
        if self._bus is not None:
            subjects = self._bus.subjects
            for subject in (subjects.heartbeats, subjects.kv_resync(self._feeds.member)):
                self._subscriptions.append(await self._bus.subscribe(subject, self._hear))

    async def stop(self) -> None:
        for subscription in self._subscriptions:
            await subscription.unsubscribe()

    def came(self, number: int, keys: Iterable[PageKey]) -> None:
        """Pages are in the class of this number."""
        self._feeds.change(self._classes[number].tier, keys, came=True)

    def went(self, number: int, keys: Iterable[PageKey]) -> None:
        """Pages are not in the class of this number any more; the manager knows already."""
        tier = self._classes[number].tier
        # Several folders are one tier to the router.
        others = [
            self._manager.pages(other.number)
            for other in self._classes
            if other.tier is tier and other.number != number
        ]
        gone = (key for key in keys if not any(key.path in pages for pages in others)) if others else keys
        self._feeds.change(tier, gone, came=False)

    def flush(self) -> None:
        """Tell what changed."""
        self._publish(self._feeds.flush())

    def _hear(self, message: AnyMessage) -> None:
        if isinstance(message, Heartbeat) and message.fingerprint and message.page_tokens:
            self._feeds.learn(message.fingerprint, message.page_tokens)
        elif isinstance(message, KvResync):
            self._publish(self._feeds.snapshot())

    def _publish(self, messages: Iterable[KvEvents]) -> None:
        if self._bus is None:
            return
        for message in messages:
            try:
                self._bus.publish(self._bus.subjects.kv_events, message)
            except BusError as error:
                # Its number is missing now: the router notices and asks for everything.
                self._metrics.errors.labels("publish").inc()
                logger.error("the router is not told where pages are: %s", error)
