"""Tells the router which pages an engine has: changes of a moment together, everything when it asks."""

from __future__ import annotations

import asyncio
import logging

from llmserve.bus.base import Bus, BusError
from llmserve.bus.messages import KvChange, KvEvents
from llmserve.workers.kv_feed import KvFeed
from llmserve.workers.metrics import OneWorker

logger = logging.getLogger(__name__)

FLUSH_S = 0.02
"""Changes of pages within so long travel together."""


class PageNews:
    """One worker's ``KvFeed`` on the bus, until ``stop``."""

    def __init__(self, bus: Bus, feed: KvFeed, member: str, metrics: OneWorker) -> None:
        self._bus = bus
        self._feed = feed
        self._member = member
        self._metrics = metrics
        self._timer: asyncio.TimerHandle | None = None
        self._stopped = False

    @property
    def seq(self) -> int:
        """Of the last message."""
        return self._feed.seq

    def note(self, changes: list[KvChange], *, unheard: int = 0) -> None:
        """What the router is told waits ``FLUSH_S`` for more.

        ``unheard``: how often the engine told of pages besides, but was not understood.
        """
        for _ in range(unheard):
            self._metrics.failed("kv events")
        try:
            self._feed.change(changes)
        except ValueError as error:
            self._metrics.failed("kv events")
            logger.error("worker %s: its engine's KV events: %s", self._member, error)
        if self._timer is None and self._feed.pending and not self._stopped:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_S, self._flush)

    def tell_all(self) -> None:
        """The router has missed something."""
        self._metrics.resynced()
        self._tell(self._feed.snapshot())

    def stop(self) -> None:
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()

    def _flush(self) -> None:
        self._timer = None
        self._tell(self._feed.flush())

    def _tell(self, messages: list[KvEvents]) -> None:
        for message in messages:
            try:
                self._bus.publish(self._bus.subjects.kv_events, message)
            except BusError as error:
                # Its number is missing now: the router notices and asks for everything.
                self._metrics.failed("kv events")
                logger.error("worker %s: kv events failed: %s", self._member, error)
