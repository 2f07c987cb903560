"""What every bus does: the same tests on ``MemoryBus`` and on ``NatsBus`` with a real server."""

from __future__ import annotations

import asyncio

import pytest

from llmserve.bus.base import BusUnavailable, Overtaken, QueueFull, StoredRequest
from llmserve.bus.messages import AnyMessage
from llmserve.bus.subjects import again
from tests.bus.conftest import AnyBus, Join
from tests.bus.samples import a_cancel, a_request, a_result, until


@pytest.fixture
async def bus(join: Join) -> AnyBus:
    return await join("one")


async def test_a_subscriber_hears_everything_in_the_order_of_publication(join: Join) -> None:
    sender, receiver = await join("sender"), await join("receiver")
    heard: list[AnyMessage] = []
    await receiver.subscribe(receiver.subjects.control, heard.append)
    await receiver.flush()
    sent = [a_cancel(i) for i in range(500)]
    for message in sent:
        sender.publish(sender.subjects.control, message)
    await until(lambda: len(heard) == len(sent))
    assert heard == sent


async def test_every_subscriber_of_a_subject_hears_a_message_once(join: Join) -> None:
    one, two = await join("one"), await join("two")
    heard: list[str] = []
    await one.subscribe(one.subjects.control, lambda _: heard.append("one"))
    await two.subscribe(two.subjects.control, lambda _: heard.append("two"))
    await one.flush()
    await two.flush()
    one.publish(one.subjects.control, a_cancel("x"))
    await until(lambda: len(heard) == 2)
    await one.flush()
    assert sorted(heard) == ["one", "two"]


async def test_a_message_is_not_handled_inside_publish(bus: AnyBus) -> None:
    heard: list[AnyMessage] = []
    await bus.subscribe(bus.subjects.control, heard.append)
    bus.publish(bus.subjects.control, a_cancel("x"))
    assert not heard
    await until(lambda: heard)


async def test_nothing_is_heard_after_unsubscribing(bus: AnyBus) -> None:
    heard: list[AnyMessage] = []
    first = await bus.subscribe(bus.subjects.control, heard.append)
    await first.unsubscribe()
    later: list[AnyMessage] = []
    await bus.subscribe(bus.subjects.control, later.append)
    bus.publish(bus.subjects.control, a_cancel("x"))
    await until(lambda: later)
    assert not heard


async def test_a_publisher_is_told_when_nobody_listens(bus: AnyBus) -> None:
    alone = asyncio.Event()
    bus.publish(bus.subjects.work("gone"), a_cancel("x"), no_responders=alone.set)
    async with asyncio.timeout(5):
        await alone.wait()


async def test_a_publisher_is_not_told_so_when_somebody_listens(bus: AnyBus) -> None:
    heard: list[AnyMessage] = []
    alone: list[bool] = []
    await bus.subscribe(bus.subjects.work("w"), heard.append)
    await bus.flush()
    bus.publish(bus.subjects.work("w"), a_cancel("x"), no_responders=lambda: alone.append(True))
    await until(lambda: heard)
    await bus.flush()
    assert not alone


async def test_a_failing_handler_is_counted_and_hears_the_next_message(bus: AnyBus) -> None:
    heard: list[AnyMessage] = []

    def fail_once(message: AnyMessage) -> None:
        heard.append(message)
        if len(heard) == 1:
            raise RuntimeError("boom")

    await bus.subscribe(bus.subjects.control, fail_once)
    bus.publish(bus.subjects.control, a_cancel(1))
    bus.publish(bus.subjects.control, a_cancel(2))
    await until(lambda: len(heard) == 2)
    assert bus.counters.handler_errors == 1


async def test_an_accepted_request_can_be_fetched_as_it_was(bus: AnyBus) -> None:
    request = a_request("a", body=bytes(range(256)))
    seq = await bus.accept(request, "acme", "batch")
    stored = await bus.fetch(seq)
    assert stored is not None
    assert (stored.seq, stored.tenant, stored.klass, stored.request) == (seq, "acme", "batch", request)


async def test_a_request_of_a_megabyte_is_stored_whole(bus: AnyBus) -> None:
    request = a_request("big", body=b"x" * (1 << 20))
    stored = await bus.fetch(await bus.accept(request, "acme", "batch"))
    assert stored is not None
    assert stored.request == request


async def test_the_same_attempt_is_stored_once(bus: AnyBus) -> None:
    first = await bus.accept(a_request("a"), "acme", "interactive")
    assert await bus.accept(a_request("a"), "acme", "interactive") == first


async def test_the_next_attempt_is_stored_beside_the_first(bus: AnyBus) -> None:
    first = await bus.accept(a_request("a", 0), "acme", "interactive")
    assert await bus.accept(a_request("a", 1), "acme", "interactive") > first
    assert await bus.fetch(first) is not None


async def test_a_full_queue_refuses_its_own_tenant_only(bus: AnyBus) -> None:
    for i in range(3):
        await bus.accept(a_request(f"a{i}"), "acme", "interactive")
    with pytest.raises(QueueFull, match="acme"):
        await bus.accept(a_request("a3"), "acme", "interactive")
    for i in range(3):
        await bus.accept(a_request(f"b{i}"), "bolt", "interactive")


async def test_a_full_queue_still_knows_what_it_accepted(bus: AnyBus) -> None:
    seqs = [await bus.accept(a_request(f"a{i}"), "acme", "interactive") for i in range(3)]
    assert await bus.accept(a_request("a1"), "acme", "interactive") == seqs[1]


async def test_a_discarded_request_makes_room_in_the_queue(bus: AnyBus) -> None:
    seqs = [await bus.accept(a_request(f"a{i}"), "acme", "interactive") for i in range(3)]
    await bus.discard(seqs[0])
    assert await bus.accept(a_request("a3"), "acme", "interactive") > seqs[2]


async def test_a_later_attempt_is_stored_though_its_tenants_queue_is_full(bus: AnyBus) -> None:
    first = [await bus.accept(a_request(f"a{i}"), "acme", "interactive") for i in range(3)]
    later = await bus.accept(a_request("a0", 1), "acme", again("interactive"))
    assert later > first[2]
    assert await bus.accept(a_request("a0", 1), "acme", again("interactive")) == later


async def test_a_later_attempt_is_of_the_class_and_the_tenant_of_the_first(bus: AnyBus) -> None:
    stored = await bus.fetch(await bus.accept(a_request("a", 1), "acme", again("batch")))
    assert stored is not None
    assert (stored.klass, stored.tenant) == ("batch", "acme")


async def test_later_attempts_take_no_place_of_first_ones_and_have_a_limit_of_their_own(bus: AnyBus) -> None:
    for i in range(3):
        await bus.accept(a_request(f"a{i}", 1), "acme", again("interactive"))
    with pytest.raises(QueueFull, match="acme"):
        await bus.accept(a_request("a3", 1), "acme", again("interactive"))
    for i in range(3):
        await bus.accept(a_request(f"b{i}"), "acme", "interactive")


async def test_only_the_first_discard_takes_a_request_off(bus: AnyBus) -> None:
    seq = await bus.accept(a_request("a"), "acme", "interactive")
    assert await bus.discard(seq)
    assert not await bus.discard(seq)
    assert await bus.fetch(seq) is None


async def test_a_sequence_that_never_was_can_be_neither_fetched_nor_discarded(bus: AnyBus) -> None:
    assert await bus.fetch(12345) is None
    assert not await bus.discard(12345)


async def test_a_finished_request_is_off_the_stream(bus: AnyBus) -> None:
    seq = await bus.accept(a_request("a"), "acme", "interactive")
    assert await bus.finish(seq, "acme", a_result("a"))
    assert await bus.fetch(seq) is None


async def test_a_request_finishes_once_even_when_two_attempts_complete(bus: AnyBus) -> None:
    first = await bus.accept(a_request("a", 0), "acme", "interactive")
    second = await bus.accept(a_request("a", 1), "acme", "interactive")
    assert await bus.finish(first, "acme", a_result("a", 0, "w0"))
    assert not await bus.finish(second, "acme", a_result("a", 1, "w1"))
    assert await bus.fetch(second) is None


async def test_of_many_workers_that_finish_at_once_one_records(join: Join) -> None:
    buses = [await join(f"w{i}") for i in range(4)]
    seq = await buses[0].accept(a_request("a"), "acme", "interactive")
    recorded = await asyncio.gather(
        *(bus.finish(seq, "acme", a_result("a", 0, f"w{i}")) for i, bus in enumerate(buses))
    )
    assert sorted(recorded) == [False, False, False, True]


async def test_a_follower_sees_what_was_there_then_what_comes_in_order(bus: AnyBus) -> None:
    before = [await bus.accept(a_request(f"b{i}"), f"t{i}", "interactive") for i in range(5)]
    seen: list[StoredRequest] = []
    follower = await bus.follow(seen.append)
    async with asyncio.timeout(10):
        await follower.caught_up()
    assert [stored.seq for stored in seen] == before
    after = [await bus.accept(a_request(f"c{i}"), f"t{i}", "batch") for i in range(5)]
    await until(lambda: len(seen) == 10)
    assert [stored.seq for stored in seen] == before + after
    assert (seen[-1].tenant, seen[-1].klass, seen[-1].request) == ("t4", "batch", a_request("c4"))


async def test_two_followers_of_one_member_each_see_every_request_once(bus: AnyBus) -> None:
    before = await bus.accept(a_request("before"), "acme", "batch")
    seen: tuple[list[int], list[int]] = ([], [])
    await bus.follow(lambda stored: seen[0].append(stored.seq))
    await bus.follow(lambda stored: seen[1].append(stored.seq))
    after = await bus.accept(a_request("after"), "acme", "batch")
    await until(lambda: all(after in one for one in seen))
    assert seen == ([before, after], [before, after])


async def test_a_follower_that_ended_sees_nothing_more(bus: AnyBus) -> None:
    ended: list[int] = []
    going_on: list[int] = []
    first = await bus.follow(lambda stored: ended.append(stored.seq))
    await bus.follow(lambda stored: going_on.append(stored.seq))
    await first.unsubscribe()
    await bus.accept(a_request("a"), "acme", "batch")
    await until(lambda: going_on)
    assert not ended


async def test_a_follower_of_an_empty_stream_is_caught_up(bus: AnyBus) -> None:
    follower = await bus.follow(lambda _: None)
    async with asyncio.timeout(5):
        await follower.caught_up()


async def test_a_follower_does_not_see_finished_requests(bus: AnyBus) -> None:
    seqs = [await bus.accept(a_request(f"a{i}"), "acme", "interactive") for i in range(3)]
    await bus.discard(seqs[0])
    await bus.discard(seqs[2])
    seen: list[int] = []
    follower = await bus.follow(lambda stored: seen.append(stored.seq))
    async with asyncio.timeout(10):
        await follower.caught_up()
    assert seen == [seqs[1]]


async def test_each_lead_has_a_higher_epoch_and_everyone_sees_who_leads(join: Join) -> None:
    one, two = await join("one"), await join("two")
    assert await two.leader() == ("", 0)
    first = await one.lead("router-1")
    assert await two.leader() == ("router-1", first)
    second = await two.lead("router-2")
    assert second > first
    assert await one.leader() == ("router-2", second)


async def test_of_two_that_would_follow_the_same_leader_one_leads(join: Join) -> None:
    one, two = await join("one"), await join("two")
    first = await one.lead("router-1", over=0)
    with pytest.raises(Overtaken):
        await two.lead("router-2", over=0)
    second = await two.lead("router-2", over=first)
    with pytest.raises(Overtaken):
        await one.lead("router-1", over=first)
    assert await one.leader() == ("router-2", second)


async def test_the_contents_are_the_requests_that_are_not_finished(bus: AnyBus) -> None:
    assert (await bus.contents()).seqs == frozenset()
    seqs = [await bus.accept(a_request(f"r{i}"), f"t{i % 2}", "interactive") for i in range(6)]
    for seq in (seqs[0], seqs[2], seqs[5]):
        await bus.discard(seq)
    contents = await bus.contents()
    assert contents.seqs == {seqs[1], seqs[3], seqs[4]}
    assert contents.last_seq == seqs[5]


async def test_a_round_trip_takes_some_time(bus: AnyBus) -> None:
    assert 0 < await bus.round_trip_s() < 5


async def test_a_closed_bus_says_so(bus: AnyBus) -> None:
    await bus.close()
    with pytest.raises(BusUnavailable):
        await bus.accept(a_request(), "acme", "interactive")
    with pytest.raises(BusUnavailable):
        bus.publish(bus.subjects.control, a_cancel("x"))


async def test_closing_sends_what_was_published(join: Join) -> None:
    sender, receiver = await join("sender"), await join("receiver")
    heard: list[AnyMessage] = []
    await receiver.subscribe(receiver.subjects.control, heard.append)
    await receiver.flush()
    for i in range(100):
        sender.publish(sender.subjects.control, a_cancel(i))
    await sender.close()
    await until(lambda: len(heard) == 100)
