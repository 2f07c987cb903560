"""How members say that they are there."""

from __future__ import annotations

import asyncio

from llmserve.bus.membership import Beater
from llmserve.bus.memory import MemoryBroker
from llmserve.bus.messages import AnyMessage, Heartbeat
from tests.bus.samples import a_beat, until


async def test_a_beater_beats_at_once_and_then_regularly() -> None:
    bus = MemoryBroker().bus("m")
    heard: list[AnyMessage] = []
    await bus.subscribe(bus.subjects.heartbeats, heard.append)
    beater = Beater(bus, a_beat, every_s=0.02)
    beater.start()
    await until(lambda: len(heard) >= 3)
    await beater.stop()


async def test_many_changes_at_once_are_one_heartbeat_with_the_latest_state() -> None:
    bus = MemoryBroker().bus("m")
    heard: list[AnyMessage] = []
    await bus.subscribe(bus.subjects.heartbeats, heard.append)
    slots = 0

    def beat() -> Heartbeat:
        return a_beat(slots=slots)

    beater = Beater(bus, beat, every_s=60.0)
    beater.start()
    await until(lambda: len(heard) == 1)
    for slots in range(1, 50):  # noqa: B007
        beater.changed()
    await until(lambda: len(heard) == 2)
    assert heard[1] == a_beat(slots=49)
    await asyncio.sleep(0.1)
    assert len(heard) == 2
    await beater.stop()
