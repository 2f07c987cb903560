"""Whether the bus carries messages: silence of others says something about them only while it does."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable

from llmserve.bus.base import Bus, BusError, Subscription
from llmserve.bus.messages import AnyMessage, Ping

logger = logging.getLogger(__name__)

PING_S = 0.25
AWAY_S = 1.0
"""Without a message to itself for so long, a member takes the bus for away: a server may stand still and hold its
connections open, and a process that stood still has heard nobody."""


class BusWatch:
    """Sends itself a message again and again. ``start`` first, ``stop`` last."""

    def __init__(self, bus: Bus, member: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._bus = bus
        self._member = member
        self._clock = clock
        self._heard_s = -math.inf
        self._back_s = -math.inf
        self._subscription: Subscription | None = None
        self._pinging: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Raises ``BusUnavailable``."""
        self._subscription = await self._bus.subscribe(self._bus.subjects.router(self._member), self._hear)
        self._pinging = asyncio.create_task(self._ping())

    async def stop(self) -> None:
        if self._pinging is not None:
            self._pinging.cancel()
            await asyncio.gather(self._pinging, return_exceptions=True)
        if self._subscription is not None:
            await self._subscription.unsubscribe()

    @property
    def carries(self) -> bool:
        """Whether the bus is there now."""
        return self._clock() - self._heard_s <= AWAY_S

    @property
    def back_s(self) -> float:
        """Since when, after it was away; minus infinity if it never was."""
        return max(self._back_s, self._bus.reconnected_s)

    def _hear(self, message: AnyMessage) -> None:
        if not isinstance(message, Ping) or message.member != self._member:
            return
        now_s = self._clock()
        if now_s - self._heard_s > AWAY_S and self._heard_s > -math.inf:
            logger.warning("%s: the bus carried nothing for %.1f s", self._member, now_s - self._heard_s)
            self._back_s = now_s
        self._heard_s = now_s

    async def _ping(self) -> None:
        while True:
            try:
                self._bus.publish(self._bus.subjects.router(self._member), Ping(member=self._member))
            except BusError as error:
                logger.debug("no ping: %s", error)
            await asyncio.sleep(PING_S)
