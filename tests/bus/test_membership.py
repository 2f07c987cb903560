"""Who is alive, and how members say so."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from llmserve.bus.membership import Beater, Membership
from llmserve.bus.memory import MemoryBroker
from llmserve.bus.messages import AnyMessage, Heartbeat
from tests.bus.samples import a_beat, until


def test_a_member_that_beats_is_there_with_its_last_heartbeat() -> None:
    members = Membership()
    members.handle(a_beat("a", slots=1), 0.0)
    members.handle(a_beat("a", slots=2), 1.0)
    assert members.get("a") == a_beat("a", slots=2)
    assert len(members) == 1


def test_a_silent_member_is_lost_once() -> None:
    members = Membership(silence_s=3.0)
    members.handle(a_beat("a"), 0.0)
    assert members.expire(2.9) == []
    assert members.expire(3.0) == [a_beat("a")]
    assert members.expire(9.0) == []
    assert members.get("a") is None


def test_a_member_that_leaves_is_not_lost() -> None:
    members = Membership()
    members.handle(a_beat("a"), 0.0)
    members.handle(a_beat("a", leaving=True), 1.0)
    assert members.get("a") is None
    assert members.expire(100.0) == []


Events = st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.floats(0, 2), st.booleans()), max_size=60)


@given(Events)
def test_members_are_exactly_those_heard_within_the_silence_and_not_leaving(
    events: list[tuple[str, bool, float, bool]],
) -> None:
    members = Membership(silence_s=3.0)
    heard: dict[str, float] = {}
    now = 0.0
    for name, leaving, pause_s, expire in events:
        now += pause_s
        if expire:
            lost = {beat.member for beat in members.expire(now)}
            assert lost == {member for member, since in heard.items() if now - since >= 3.0}
            heard = {member: since for member, since in heard.items() if member not in lost}
        else:
            members.handle(a_beat(name, leaving=leaving), now)
            heard.pop(name, None)
            if not leaving:
                heard[name] = now
        members.check()
        assert {beat.member for beat in members} == set(heard)


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
