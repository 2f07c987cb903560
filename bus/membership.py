"""How a member says that it is there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from llmserve.bus.base import Bus
from llmserve.bus.messages import Heartbeat

BEAT_S = 1.0
COALESCE_S = 0.02


class Beater:
    """Publishes a member's heartbeat each second, and soon after each change and each reconnect."""

    def __init__(self, bus: Bus, heartbeat: Callable[[], Heartbeat], every_s: float = BEAT_S) -> None:
        self._bus = bus
        self._heartbeat = heartbeat
        self._every_s = every_s
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._leave_bus: Callable[[], None] | None = None

    def start(self) -> None:
        """Beat now and from now on."""
        self.beat()
        self._leave_bus = self._bus.on_reconnect(self._reconnected)
        self._task = asyncio.create_task(self._run())

    def changed(self) -> None:
        """Beat within ``COALESCE_S``: many changes of a moment are one heartbeat."""
        self._changed.set()

    def beat(self) -> None:
        """Beat at once."""
        self._bus.publish(self._bus.subjects.heartbeats, self._heartbeat())

    async def stop(self) -> None:
        """Beat no more; the last word, with ``leaving``, is the caller's."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        if self._leave_bus is not None:
            self._leave_bus()
            self._leave_bus = None

    async def _reconnected(self) -> None:
        self.changed()

    async def _run(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._every_s):
                    await self._changed.wait()
                await asyncio.sleep(COALESCE_S)
            except TimeoutError:
                pass
            self._changed.clear()
            self.beat()
