"""Publishes that wait for the connection: bounded, in order, the oldest dropped when it stays away."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable

import msgspec

from llmserve.bus.settings import BusCounters

logger = logging.getLogger(__name__)


class Outgoing(msgspec.Struct, frozen=True):
    """One publish."""

    subject: str
    data: bytes
    no_responders: Callable[[], None] | None = None


class Outbox:
    """A queue between synchronous publishers and the one task that writes."""

    def __init__(self, max_bytes: int, counters: BusCounters) -> None:
        self._max_bytes = max_bytes
        self._counters = counters
        self._items: deque[Outgoing] = deque()
        self._bytes = 0
        self._dropping = False
        self._filled = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: Outgoing) -> None:
        """Append; drops the oldest beyond the bound, since the newest say what is true now and reveal the gap."""
        self._items.append(item)
        self._bytes += len(item.data)
        while self._bytes > self._max_bytes and len(self._items) > 1:
            self._bytes -= len(self._items.popleft().data)
            self._counters.dropped_publishes += 1
            if not self._dropping:
                self._dropping = True
                logger.warning("the outbox is full while the bus is away: dropping the oldest publishes")
        self._empty.clear()
        self._filled.set()

    async def wait(self) -> None:
        """Return when there is something to take."""
        await self._filled.wait()

    def take(self) -> Outgoing | None:
        """The oldest, None if there is none."""
        if not self._items:
            self._filled.clear()
            self._dropping = False
            return None
        item = self._items.popleft()
        self._bytes -= len(item.data)
        return item

    def drained(self) -> None:
        """Called by the writer when all it took has been written."""
        if not self._items:
            self._empty.set()

    async def wait_drained(self) -> None:
        """Return once all that was put has been written."""
        await self._empty.wait()
