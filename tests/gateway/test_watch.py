"""Requests of which nothing comes: what the stream says of one attempt is not taken for another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
from prometheus_client import CollectorRegistry

from llmserve.bus.base import StoredRequest
from llmserve.gateway.attempts import Action, Attempts, Mode, Submit
from llmserve.gateway.call import Call
from llmserve.gateway.metrics import GatewayMetrics
from llmserve.gateway.watch import Watch
from tests.gateway.fake import FakeBus
from tests.sim_gateway import SimCodec


class SlowBus(FakeBus):
    """Nothing is on its stream; it says so when ``answer`` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []
        self.answer = asyncio.Event()

    async def fetch(self, seq: int) -> StoredRequest | None:
        self.asked.append(seq)
        await self.answer.wait()
        return None


@dataclass
class Watched:
    """One call, stored as sequence 1, and what is to be done about it."""

    bus: SlowBus
    call: Call
    watch: Watch
    actions: list[Action] = field(default_factory=list)

    def sweep(self, after_s: float) -> None:
        self.watch._sweep(self.call.progress_s + after_s)

    async def answered(self) -> None:
        self.bus.answer.set()
        async with asyncio.timeout(5):
            while self.call.probing:
                await asyncio.sleep(0)


@pytest.fixture
async def one() -> AsyncIterator[Watched]:
    metrics = GatewayMetrics(CollectorRegistry()).of_tenant("t")
    call = Call("1", "t", "interactive", SimCodec([1, 2], 8), Attempts(Mode.RESUME, 8), metrics, 0.0)
    call.attempts.start()
    call.attempts.stored(0, 1)
    bus, actions = SlowBus(), list[Action]()
    watch = Watch(bus, {call.request_id: call}, lambda _, more, __: actions.extend(more), 600.0, 5.0)
    yield Watched(bus, call, watch, actions)
    watch.stop()


async def test_a_request_off_the_stream_whose_end_never_came_is_tried_again(one: Watched) -> None:
    one.sweep(4.0)
    assert one.bus.asked == []
    one.sweep(6.0)
    await one.answered()
    assert one.bus.asked == [1]
    one.sweep(7.0)
    assert one.actions == [Submit(1, 0)]


async def test_an_answer_about_an_attempt_that_was_given_up_meanwhile_is_none_about_the_next(one: Watched) -> None:
    one.sweep(6.0)
    await asyncio.sleep(0)
    one.call.attempts.lost(0, "its worker died")
    await one.answered()
    assert one.call.missing_since_s is None
    one.sweep(7.0)
    assert one.actions == []


async def test_an_attempt_that_takes_long_to_be_stored_is_not_given_up_for_the_one_before_it(one: Watched) -> None:
    one.call.attempts.lost(0, "its worker died")
    one.sweep(60.0)
    assert one.bus.asked == []
    one.call.attempts.stored(1, 2)
    one.sweep(60.0)
    await one.answered()
    assert one.bus.asked == [2]


async def test_a_late_token_does_not_end_the_looking(one: Watched) -> None:
    one.sweep(6.0)
    await one.answered()
    assert one.call.missing_since_s is not None
    one.call.progress_s = one.call.missing_since_s + 1.0
    one.sweep(1.0)
    assert one.actions == []
    one.sweep(30.0)
    await one.answered()
    one.sweep(31.0)
    assert one.bus.asked == [1, 1]
