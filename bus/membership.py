"""Who is there: how a member says so, and how others keep the list."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

from llmserve.bus.base import Bus
from llmserve.bus.messages import Heartbeat

BEAT_S = 1.0
COALESCE_S = 0.02
SILENCE_S = 3.0
"""A member not heard for so long is lost: three heartbeats, since a host may stall for more than one."""


class Membership:
    """The members that are alive, by their heartbeats. Pure: the caller brings the time."""

    def __init__(self, silence_s: float = SILENCE_S) -> None:
        self._silence_s = silence_s
        self._beats: dict[str, Heartbeat] = {}
        self._heard_s: dict[str, float] = {}
        """In the order in which they were heard, the longest silent first."""

    def __iter__(self) -> Iterator[Heartbeat]:
        return iter(list(self._beats.values()))

    def __len__(self) -> int:
        return len(self._beats)

    def get(self, member: str) -> Heartbeat | None:
        """The member's last heartbeat, None if it is not there."""
        return self._beats.get(member)

    def handle(self, beat: Heartbeat, now: float) -> None:
        """Take note of a heartbeat; one that says ``leaving`` takes the member off."""
        self._beats.pop(beat.member, None)
        self._heard_s.pop(beat.member, None)
        if not beat.leaving:
            self._beats[beat.member] = beat
            self._heard_s[beat.member] = now

    def expire(self, now: float) -> list[Heartbeat]:
        """Take off the members that have been silent too long; returns their last heartbeats."""
        lost = []
        while self._heard_s:
            member, heard_s = next(iter(self._heard_s.items()))
            if now - heard_s < self._silence_s:
                break
            del self._heard_s[member]
            lost.append(self._beats.pop(member))
        return lost

    def check(self) -> None:
        """Assert the invariants."""
        assert self._beats.keys() == self._heard_s.keys()
        assert list(self._heard_s.values()) == sorted(self._heard_s.values())
        assert not any(beat.leaving for beat in self._beats.values())


class Beater:
    """Publishes a member's heartbeat each second, and soon after each change."""

    def __init__(self, bus: Bus, heartbeat: Callable[[], Heartbeat], every_s: float = BEAT_S) -> None:
        self._bus = bus
        self._heartbeat = heartbeat
        self._every_s = every_s
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Beat now and from now on."""
        self.beat()
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
