"""The bus when the server is killed, away, or feeds it garbage."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import time
from functools import partial

import nats
import pytest

from llmserve.bus.base import BusError, BusUnavailable, QueueFull, StoredRequest
from llmserve.bus.follower import StreamFollower
from llmserve.bus.inbox import Reply
from llmserve.bus.messages import AnyMessage, Cancel
from llmserve.bus.nats import connect
from llmserve.bus.server import EmbeddedServer
from llmserve.bus.settings import BusSettings
from llmserve.bus.subjects import Subjects
from tests.bus.conftest import JoinNats
from tests.bus.samples import a_cancel, a_request, a_result, login, until

pytestmark = pytest.mark.faults


def kill(server: EmbeddedServer) -> None:
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)


async def outage(server: EmbeddedServer, seconds: float) -> None:
    kill(server)
    await asyncio.sleep(seconds)
    server.restart()


async def test_accepted_requests_survive_a_killed_server_and_the_follower_goes_on(
    server: EmbeddedServer, join_nats: JoinNats
) -> None:
    bus = await join_nats("m")
    seen: list[int] = []
    await bus.follow(lambda stored: seen.append(stored.seq))
    accepted = await asyncio.gather(*(bus.accept(a_request(f"r{i}"), "acme", "interactive") for i in range(200)))
    await outage(server, 0.2)
    for seq in accepted:
        assert await bus.fetch(seq) is not None
    later = await bus.accept(a_request("later"), "acme", "interactive")
    await until(lambda: seen and seen[-1] == later)
    assert seen == sorted([*accepted, later])


async def test_a_follower_that_starts_after_the_kill_sees_every_accepted_request(
    server: EmbeddedServer, join_nats: JoinNats
) -> None:
    accepting = await join_nats("gateway")
    accepted = [await accepting.accept(a_request(f"r{i}"), "acme", "interactive") for i in range(50)]
    await outage(server, 0.0)
    seen: list[int] = []
    following = await join_nats("router")
    follower = await following.follow(lambda stored: seen.append(stored.seq))
    async with asyncio.timeout(10):
        await follower.caught_up()
    assert seen == accepted


async def test_publishes_during_an_outage_of_a_second_arrive_in_order(
    server: EmbeddedServer, join_nats: JoinNats
) -> None:
    # To the publisher's own subscription: another member may come back later than they are sent.
    bus = await join_nats("m")
    heard: list[AnyMessage] = []
    await bus.subscribe(bus.subjects.control, heard.append)
    await bus.flush()
    kill(server)
    await until(lambda: not bus.connected)
    sent = [a_cancel(i) for i in range(100)]
    for message in sent:
        bus.publish(bus.subjects.control, message)
    await asyncio.sleep(1.0)
    server.restart()
    await until(lambda: len(heard) == len(sent))
    assert heard == sent
    assert bus.counters.dropped_publishes == 0


async def test_accept_waits_for_the_server_and_stores_once(server: EmbeddedServer, join_nats: JoinNats) -> None:
    bus = await join_nats("m")
    kill(server)
    accepting = [asyncio.create_task(bus.accept(a_request(f"r{i}"), "acme", "batch")) for i in range(20)]
    await asyncio.sleep(0.5)
    assert not any(task.done() for task in accepting)
    server.restart()
    async with asyncio.timeout(10):
        seqs = await asyncio.gather(*accepting)
    assert sorted(seqs) == list(range(1, 21))


async def test_accepts_under_way_when_the_server_is_killed_are_stored_exactly_once(
    server: EmbeddedServer, join_nats: JoinNats
) -> None:
    bus = await join_nats("m")
    accepting = [asyncio.create_task(bus.accept(a_request(f"r{i}"), "acme", "batch")) for i in range(500)]
    await until(lambda: any(task.done() for task in accepting))
    await outage(server, 0.1)
    async with asyncio.timeout(20):
        seqs = await asyncio.gather(*accepting)
    stored: list[str] = []
    follower = await bus.follow(lambda request: stored.append(request.request.request_id))
    async with asyncio.timeout(10):
        await follower.caught_up()
    assert len(set(seqs)) == 500
    assert sorted(stored) == sorted(f"r{i}" for i in range(500))


async def test_accept_gives_up_when_its_patience_ends(server: EmbeddedServer, join_nats: JoinNats) -> None:
    bus = await join_nats("m", BusSettings(publish_patience_s=0.5))
    server.stop()
    with pytest.raises(BusUnavailable):
        await bus.accept(a_request(), "acme", "interactive")


async def test_finish_waits_for_the_server_however_impatient(server: EmbeddedServer, join_nats: JoinNats) -> None:
    bus = await join_nats("m", BusSettings(publish_patience_s=0.2))
    seq = await bus.accept(a_request("a"), "acme", "interactive")
    kill(server)
    finishing = asyncio.create_task(bus.finish(seq, "acme", a_result("a")))
    await asyncio.sleep(1.0)
    server.restart()
    async with asyncio.timeout(20):
        assert await finishing
    assert await bus.fetch(seq) is None


async def test_a_closed_connection_ends_a_finish_that_waits(server: EmbeddedServer, join_nats: JoinNats) -> None:
    bus = await join_nats("m", BusSettings(publish_patience_s=0.2))
    seq = await bus.accept(a_request("a"), "acme", "interactive")
    server.stop()
    finishing = asyncio.create_task(bus.finish(seq, "acme", a_result("a")))
    await asyncio.sleep(0.3)
    await bus.close()
    with pytest.raises(BusUnavailable):
        async with asyncio.timeout(10):
            await finishing


async def test_epochs_grow_over_a_killed_server(server: EmbeddedServer, join_nats: JoinNats) -> None:
    one, two = await join_nats("one"), await join_nats("two")
    first = await one.lead("one")
    await outage(server, 0.0)
    assert await two.leader() == ("one", first)
    assert await two.lead("two") > first


def _reached(calls: list[int], number: int) -> bool:
    return len(calls) == number


async def test_callbacks_run_after_every_reconnect(server: EmbeddedServer, join_nats: JoinNats) -> None:
    bus = await join_nats("m")
    calls: list[int] = []

    async def note() -> None:
        calls.append(len(calls))

    bus.on_reconnect(note)
    for i in range(2):
        await outage(server, 0.0)
        await until(partial(_reached, calls, i + 1))
    assert bus.counters.reconnects == 2


async def test_a_member_comes_back_with_its_subscriptions_after_the_client_closed_itself(
    server: EmbeddedServer, join_nats: JoinNats
) -> None:
    bus = await join_nats("m")
    heard: list[AnyMessage] = []
    await bus.subscribe(bus.subjects.control, heard.append)
    await bus.flush()
    # What the client library does for good on most errors that a server reports.
    await bus._connection._now().close()
    await until(lambda: bus.counters.reconnects == 1)
    bus.publish(bus.subjects.control, a_cancel("x"))
    await until(lambda: heard)
    await bus.accept(a_request(), "acme", "batch")


async def test_the_oldest_publishes_are_dropped_and_counted_when_the_server_stays_away(
    server: EmbeddedServer, join_nats: JoinNats
) -> None:
    bus = await join_nats("m", BusSettings(outbox_max_bytes=10_000))
    heard: list[AnyMessage] = []
    await bus.subscribe(bus.subjects.control, heard.append)
    await bus.flush()
    kill(server)
    await until(lambda: not bus.connected)
    for i in range(100):
        bus.publish(bus.subjects.control, Cancel(request_ids=[f"{i:01000}"]))
    server.restart()
    await until(lambda: heard and heard[-1] == Cancel(request_ids=[f"{99:01000}"]))
    assert 0 < bus.counters.dropped_publishes < 100
    assert len(heard) == 100 - bus.counters.dropped_publishes


async def test_bytes_that_are_no_message_are_counted_and_do_not_stop_the_rest(
    server: EmbeddedServer, join_nats: JoinNats
) -> None:
    bus = await join_nats("m")
    heard: list[AnyMessage] = []
    await bus.subscribe(bus.subjects.control, heard.append)
    await bus.flush()
    stranger = await nats.connect(server.url, **login(server))
    for garbage in (b"", b"\xc1", b"hello", b'{"a":1}', b"\x91\xa7Request", b"\x93\xa6Cancel\x63\x90"):
        await stranger.publish(bus.subjects.control, garbage)
    await stranger.flush()
    bus.publish(bus.subjects.control, a_cancel("x"))
    await until(lambda: heard)
    await until(lambda: bus.counters.malformed == 6)
    await stranger.close()


async def test_garbage_on_the_request_stream_is_counted_and_followed_past(
    server: EmbeddedServer, join_nats: JoinNats
) -> None:
    bus = await join_nats("m")
    stranger = await nats.connect(server.url, **login(server))
    await stranger.jetstream().publish(bus.subjects.request("batch", "acme"), b"garbage")
    await stranger.close()
    seq = await bus.accept(a_request("a"), "acme", "batch")
    seen: list[int] = []
    follower = await bus.follow(lambda stored: seen.append(stored.seq))
    async with asyncio.timeout(10):
        await follower.caught_up()
    assert seen == [seq]
    assert bus.counters.malformed == 1


async def test_a_follower_that_cannot_keep_up_misses_nothing(server: EmbeddedServer, join_nats: JoinNats) -> None:
    accepting, following = await join_nats("gateway"), await join_nats("router")
    await asyncio.gather(*(accepting.accept(a_request(f"r{i}"), "acme", "batch") for i in range(300)))
    seen: list[int] = []

    def stall_at_first(stored: StoredRequest) -> None:
        seen.append(stored.seq)
        if len(seen) == 1:
            time.sleep(0.2)  # meanwhile the rest arrives

    follower = await following.follow(stall_at_first)
    async with asyncio.timeout(30):
        await follower.caught_up()
    assert seen == list(range(1, 301))


async def test_a_follower_gets_again_what_was_lost_on_the_way(server: EmbeddedServer, join_nats: JoinNats) -> None:
    accepting, following = await join_nats("gateway"), await join_nats("router")
    await asyncio.gather(*(accepting.accept(a_request(f"r{i}"), "acme", "batch") for i in range(300)))
    seen: list[int] = []
    follower = await following.follow(lambda stored: seen.append(stored.seq))
    async with asyncio.timeout(30):
        await follower.caught_up()
    assert isinstance(follower, StreamFollower)
    assert follower._raw is not None
    deliver, number = follower._raw.callback, itertools.count()

    def lose_some(message: Reply) -> None:
        if next(number) % 4 != 1:
            deliver(message)

    follower._raw.callback = lose_some
    await asyncio.gather(*(accepting.accept(a_request(f"s{i}"), "acme", "batch") for i in range(100)))
    await until(lambda: len(seen) == 400)
    assert seen == list(range(1, 401))
    await until(lambda: follower.recreations == 1)


async def test_a_follower_catches_up_when_what_it_waits_for_is_deleted(
    server: EmbeddedServer, join_nats: JoinNats
) -> None:
    bus, other = await join_nats("m"), await join_nats("n")
    seqs = await asyncio.gather(*(bus.accept(a_request(f"r{i}"), "acme", "batch") for i in range(300)))

    def stall_at_first(stored: StoredRequest) -> None:
        if stored.seq == 1:
            time.sleep(0.1)

    follower = await other.follow(stall_at_first)
    await asyncio.gather(*(bus.discard(seq) for seq in seqs[1:]))
    async with asyncio.timeout(10):
        await follower.caught_up()


async def test_a_follower_outlives_its_consumer(server: EmbeddedServer, join_nats: JoinNats) -> None:
    bus = await join_nats("m")
    seen: list[int] = []
    await bus.follow(lambda stored: seen.append(stored.seq))
    stranger = await nats.connect(server.url, **login(server))
    js = stranger.jetstream()
    for consumer in await js.consumers_info(bus.subjects.request_stream):
        await js.delete_consumer(bus.subjects.request_stream, consumer.name)
    await stranger.close()
    seq = await bus.accept(a_request("a"), "acme", "batch")
    await until(lambda: seen == [seq], timeout_s=15)


async def test_a_changed_manifest_changes_the_queue_limit_and_keeps_the_requests(
    server: EmbeddedServer, join_nats: JoinNats
) -> None:
    small = await join_nats("m", BusSettings(queue_max_len=1))
    seq = await small.accept(a_request("a"), "acme", "batch")
    with pytest.raises(QueueFull):
        await small.accept(a_request("b"), "acme", "batch")
    large = await join_nats("n", BusSettings(queue_max_len=2))
    assert await large.accept(a_request("b"), "acme", "batch") > seq
    assert await large.fetch(seq) is not None


async def test_a_stream_that_cannot_be_made_as_wanted_is_one_line(server: EmbeddedServer) -> None:
    stranger = await nats.connect(server.url, **login(server))
    subjects = Subjects("test")
    await stranger.jetstream().add_stream(name=subjects.request_stream, subjects=["else.>"], storage="memory")
    await stranger.close()
    with pytest.raises(BusError, match=f"stream {subjects.request_stream} cannot be changed in .*storage"):
        await connect(server.url, server.token, "test", member="m")


async def test_a_message_beyond_the_servers_limit_is_refused_by_name(join_nats: JoinNats) -> None:
    bus = await join_nats("m")
    with pytest.raises(BusError, match="are more than the bus takes"):
        await bus.accept(a_request(body=b"x" * (9 << 20)), "acme", "batch")


async def test_an_address_without_server_is_unavailable_when_patience_ends() -> None:
    with pytest.raises(BusUnavailable, match="no bus at"):
        await connect("nats://127.0.0.1:9", None, "test", member="m", settings=BusSettings(publish_patience_s=0.3))
