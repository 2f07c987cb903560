"""The pure parts of the connection: outbox, inbox, places in a stream."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmserve.bus.follower import Place, parse_place
from llmserve.bus.inbox import Disconnected, Inbox
from llmserve.bus.outbox import Outbox, Outgoing
from llmserve.bus.settings import BusCounters


@dataclass
class FakeReply:
    subject: str
    reply: str = ""
    data: bytes = b""
    headers: dict[str, str] | None = field(default=None)


@given(st.lists(st.binary(max_size=40), max_size=50), st.integers(1, 300))
async def test_an_outbox_keeps_the_newest_in_order_and_counts_the_rest(items: list[bytes], bound: int) -> None:
    counters = BusCounters()
    outbox = Outbox(bound, counters)
    for data in items:
        outbox.put(Outgoing("s", data))
    kept = []
    while (item := outbox.take()) is not None:
        kept.append(item.data)
    assert kept == items[len(items) - len(kept) :]
    assert counters.dropped_publishes == len(items) - len(kept)
    assert len(kept) <= 1 or sum(map(len, kept)) <= bound


@pytest.mark.parametrize(
    ("reply", "place"),
    [
        ("$JS.ACK.S.C.1.17.5.1700000000000000000.3", Place(17, 5, 3)),
        ("$JS.ACK.dom.acc.S.C.1.17.5.1700000000000000000.3", Place(17, 5, 3)),
        ("$JS.ACK._.acc.S.C.1.17.5.1700000000000000000.0.rnd", Place(17, 5, 0)),
    ],
)
def test_a_place_is_read_from_both_forms_of_a_reply_subject(reply: str, place: Place) -> None:
    assert parse_place(reply) == place


async def test_a_reply_reaches_the_request_that_waits_for_it_only() -> None:
    inbox = Inbox("_INBOX.x")
    (one, future_one), (two, future_two) = inbox.expect(5), inbox.expect(5)
    inbox.deliver(FakeReply(two, data=b"2"))
    assert (await future_two).data == b"2"
    assert not future_one.done()
    inbox.deliver(FakeReply(one, data=b"1"))
    assert (await future_one).data == b"1"


async def test_a_request_without_reply_times_out_and_a_late_reply_is_dropped() -> None:
    inbox = Inbox("_INBOX.x")
    subject, future = inbox.expect(0.01)
    with pytest.raises(TimeoutError):
        await future
    inbox.deliver(FakeReply(subject))


async def test_a_disconnect_fails_all_requests_at_once() -> None:
    inbox = Inbox("_INBOX.x")
    futures = [inbox.expect(60)[1] for _ in range(3)]
    inbox.disconnected()
    for result in await asyncio.gather(*futures, return_exceptions=True):
        assert isinstance(result, Disconnected)


def test_a_probe_hears_of_no_responders_once() -> None:
    inbox = Inbox("_INBOX.x")
    calls: list[int] = []
    subject = inbox.probe(lambda: calls.append(1))
    for _ in range(2):
        inbox.deliver(FakeReply(subject, headers={"Status": "503"}))
    assert calls == [1]


def test_probes_that_were_received_are_forgotten() -> None:
    inbox = Inbox("_INBOX.x", probe_age_s=0.0)
    for _ in range(100):
        inbox.probe(lambda: None)
    assert len(inbox._probes) == 1
