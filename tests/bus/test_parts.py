"""The pure parts of the connection: outbox, inbox, places in a stream."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, field
from functools import partial

import nats.errors
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmserve.bus.follower import Place, parse_place
from llmserve.bus.inbox import Disconnected, Inbox
from llmserve.bus.outbox import Outbox, Outgoing
from llmserve.bus.settings import BusCounters
from llmserve.bus.wire import Arrived, DirectClient


@dataclass
class FakeReply:
    subject: str
    reply: str = ""
    data: bytes = b""
    headers: dict[str, str] | None = field(default=None)

    @property
    def status(self) -> str:
        return (self.headers or {}).get("Status", "")


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


LINES = (
    b"MSG s.1 1 5\r\nhello\r\n"
    b"PING\r\n"
    b"MSG s.2 1 r.1 0\r\n\r\n"
    b"HMSG s.3 1 r.2 34 36\r\nNATS/1.0 503 none\r\nNats-X: a:b\r\n\r\nhi\r\n"
    b"+OK\r\n"
    b"MSG s.4 2 4\r\ngone\r\n"
    b"PONG\r\n"
    b"-ERR 'Permissions Violation for Publish'\r\n"
    b"HMSG s.5 1 16 19\r\nNATS/1.0 100\r\n\r\na\r\n\r\n"
)


class Transport:
    """What the library reads from."""

    def __init__(self) -> None:
        self._io_reader = asyncio.StreamReader()

    async def read(self, size: int) -> bytes:
        return await self._io_reader.read(size)

    def at_eof(self) -> bool:
        return False


@given(st.lists(st.integers(0, len(LINES)), max_size=12), st.booleans())
async def test_a_message_is_read_whole_and_in_order_however_it_is_cut(cuts: list[int], turns: bool) -> None:
    client = DirectClient()
    heard: list[tuple[str, str, bytes, dict[str, str] | None]] = []

    def hear(message: Arrived) -> None:
        assert message.status == (message.headers or {}).get("Status", "")
        heard.append((message.subject, message.reply, message.data, message.headers))

    client.handlers[b"1"] = hear
    told: list[str] = []

    async def tell(what: str, *_: object) -> None:
        told.append(what)

    client._process_ping = partial(tell, "ping")
    client._process_pong = partial(tell, "pong")
    client._process_err = tell
    client._transport, client._status = Transport(), client.CONNECTED
    reading = asyncio.create_task(client._read_loop())
    await asyncio.sleep(0)
    edges = [0, *sorted(cuts), len(LINES)]
    for begin, end in itertools.pairwise(edges):
        client._transport._io_reader.feed_data(LINES[begin:end])
        if turns:
            await asyncio.sleep(0)
    for _ in range(20):
        await asyncio.sleep(0)
    reading.cancel()
    assert heard == [
        ("s.1", "", b"hello", None),
        ("s.2", "r.1", b"", None),
        ("s.3", "r.2", b"hi", {"Status": "503", "Description": "none", "Nats-X": "a:b"}),
        ("s.5", "", b"a\r\n", {"Status": "100"}),
    ]
    assert told == ["ping", "pong", "'permissions violation for publish'"]


async def test_messages_are_heard_as_the_socket_is_read_and_what_they_defer_follows_the_last_of_them() -> None:
    client = DirectClient()
    heard: list[bytes] = []

    def hear(message: Arrived) -> None:
        heard.append(message.data)
        client.defer(lambda: heard.append(b"after " + message.data))

    client.handlers[b"1"] = hear
    client._transport, client._status = Transport(), client.CONNECTED
    reading = asyncio.create_task(client._read_loop())
    await asyncio.sleep(0)
    client._transport._io_reader.feed_data(b"MSG s 1 1\r\na\r\nMSG s 1 1\r\nb\r\n")
    assert heard == [b"a", b"b", b"after a", b"after b"]
    client._status = client.RECONNECTING
    client._transport._io_reader.feed_data(b"MSG s 1 4\r\nlate\r\n")
    assert len(heard) == 4
    client.defer(lambda: heard.append(b"soon"))
    await asyncio.sleep(0)
    assert heard[4:] == [b"soon"]
    reading.cancel()


async def test_what_a_lost_connection_left_unread_is_not_read_into_the_next() -> None:
    client = DirectClient()
    heard: list[bytes] = []
    client.handlers[b"1"] = lambda m: heard.append(m.data)
    await client._ps.parse(b"MSG s 1 5\r\nhe")
    client._ps.reset()
    await client._ps.parse(b"MSG s 1 2\r\nok\r\n")

    async def lose(_: str) -> None:
        client._ps.reset()

    client._process_err = lose
    await client._ps.parse(b"-ERR 'Stale Connection'\r\nMSG s 1 3\r\nold\r\nMSG s 1 9\r\nha")
    await client._ps.parse(b"MSG s 1 3\r\nnew\r\n")
    assert heard == [b"ok", b"new"]


async def test_a_connection_that_failed_while_it_was_made_is_not_heard_on_the_next() -> None:
    client = DirectClient()
    heard: list[bytes] = []
    client.handlers[b"1"] = lambda m: heard.append(m.data)
    client._transport, client._status = Transport(), client.CONNECTED
    failed, readings = client._transport._io_reader, []
    for _ in range(2):
        readings.append(asyncio.create_task(client._read_loop()))
        await asyncio.sleep(0)
        client._transport._io_reader.feed_data(b"MSG s 1 5\r\nhe")
        client._transport._io_reader = asyncio.StreamReader()  # which is all that the library changes
    readings.append(asyncio.create_task(client._read_loop()))
    await asyncio.sleep(0)
    failed.feed_data(b"llo\r\n")
    client._transport._io_reader.feed_data(b"MSG s 1 2\r\nok\r\n")
    assert heard == [b"ok"]
    for reading in readings:
        reading.cancel()


@pytest.mark.parametrize(
    "line", [b"MSG s 1\r\n", b"MSG s 1 x\r\n\r\n", b"HMSG s 1 2 y\r\n", b"HELLO\r\n", b"A" * 70000]
)
async def test_what_is_not_the_protocol_is_an_error(line: bytes) -> None:
    with pytest.raises(nats.errors.ProtocolError):
        await DirectClient()._ps.parse(line)


@pytest.mark.parametrize(
    ("subject", "reply", "headers"),
    [("", "", None), ("a b", "", None), ("a\r\nPUB b", "", None), ("a", "r\n", None), ("a", "", {"k": "v\r\nx: y"})],
)
def test_what_would_be_another_command_is_not_sent(subject: str, reply: str, headers: dict[str, str] | None) -> None:
    with pytest.raises((nats.errors.BadSubjectError, nats.errors.BadHeaderError)):
        DirectClient().send(subject, b"", reply, headers)
