"""Which sequences a stream holds, at the least cost to whoever asks."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmserve.bus import jetstream
from llmserve.bus.jetstream import Answer, between
from llmserve.bus.nats import NatsBus
from llmserve.bus.settings import BusSettings
from tests.bus.conftest import JoinNats
from tests.bus.samples import a_request

LISTED, WALKED = 10**6, 1
"""Gaps for which a message is read: so many that they are listed, and so few that the messages are walked."""


@given(st.sets(st.integers(1, 60)))
def test_what_is_there_is_what_is_not_deleted(there: set[int]) -> None:
    if there:
        first, last = min(there), max(there)
        deleted = [seq for seq in range(first, last + 1) if seq not in there]
        assert between(first, last, deleted) == there
        assert between(first, last, reversed(deleted)) == there


async def filled(join_nats: JoinNats, kept: set[int], number: int) -> NatsBus:
    bus = await join_nats("m", BusSettings())
    for i in range(1, number + 1):
        seq = await bus.accept(a_request(f"r{i}"), f"t{i % 3}", "batch")
        assert seq == i
    for seq in range(1, number + 1):
        if seq not in kept:
            await bus.discard(seq)
    return bus


@pytest.mark.parametrize("gaps_per_read", [LISTED, WALKED])
@pytest.mark.parametrize("kept", [{1, 2, 3}, {1}, {1, 9}, {4, 5, 11}, {12}, set()])
async def test_listed_or_walked_the_contents_are_the_same(
    join_nats: JoinNats, monkeypatch: pytest.MonkeyPatch, gaps_per_read: int, kept: set[int]
) -> None:
    monkeypatch.setattr(jetstream, "GAPS_PER_READ", gaps_per_read)
    bus = await filled(join_nats, kept, 12)
    contents = await bus.contents()
    assert contents.last_seq == 12
    assert contents.seqs == kept


async def test_the_leader_of_a_cluster_reads_the_same(join_nats: JoinNats, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jetstream, "GAPS_PER_READ", WALKED)
    bus = await filled(join_nats, {4, 11}, 12)
    monkeypatch.setattr(bus.jetstream, "_direct_get", bus.jetstream._leader_get)
    assert (await bus.contents()).seqs == {4, 11}


@pytest.mark.parametrize(("kept", "lists"), [({1}, 0), ({1, 2, 3, 5}, 1), (set(range(1, 13)), 0), (set(), 0)])
async def test_what_is_deleted_is_asked_for_only_where_that_is_less_than_to_read_what_is_there(
    join_nats: JoinNats, monkeypatch: pytest.MonkeyPatch, kept: set[int], lists: int
) -> None:
    monkeypatch.setattr(jetstream, "GAPS_PER_READ", 5)
    bus = await filled(join_nats, kept, 12)
    asked: list[object] = []
    call: Callable[..., Awaitable[Answer]] = bus.jetstream.call

    async def noted(what: str, body: object = None) -> Answer:
        asked.append(body)
        return await call(what, body)

    monkeypatch.setattr(bus.jetstream, "call", noted)
    assert (await bus.contents()).seqs == kept
    assert asked.count({"deleted_details": True}) == lists


async def test_what_is_stored_while_the_contents_are_read_is_not_of_them(
    join_nats: JoinNats, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jetstream, "GAPS_PER_READ", WALKED)
    bus = await filled(join_nats, {1, 12}, 12)
    call: Callable[..., Awaitable[Answer]] = bus.jetstream.call

    async def then_stored(what: str, body: object = None) -> Answer:
        answer = await call(what, body)
        await bus.accept(a_request("late"), "acme", "batch")
        return answer

    monkeypatch.setattr(bus.jetstream, "call", then_stored)
    contents = await bus.contents()
    assert contents.last_seq == 12
    assert contents.seqs == {1, 12}
