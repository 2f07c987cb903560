"""A worker's part of the protocol, on a bus in memory with the simulated engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from msgspec.structs import replace as changed

from llmserve.bus.base import BusUnavailable
from llmserve.bus.messages import (
    Accepted,
    Cancel,
    Deltas,
    Failed,
    Finished,
    Grant,
    HandedOff,
    Heartbeat,
    Reason,
    Refused,
    Result,
    Role,
    Stage,
    Sync,
)
from llmserve.workers.engine.base import EngineDied, Step
from llmserve.workers.engine.simulated import SimulatedEngine, SimulatedSettings
from llmserve.workers.worker import WorkerDied
from tests.workers.world import FAST, World, expected, request, settings, until

PROMPT = list(range(1, 41))
SLOW = replace(FAST, step_s=0.02)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    await world.open()
    yield world
    await world.close()


async def finished(world: World, count: int = 1) -> list[Finished]:
    await until(lambda: len(world.events.of(Finished)) >= count)
    return world.events.of(Finished)


def pages_free(world: World) -> int:
    return sum(worker._engine.load().pages_free for worker, _ in world.workers)


# -- the life of a grant


async def test_a_request_is_accepted_streamed_recorded_taken_off_the_stream_and_reported_in_this_order(
    world: World,
) -> None:
    worker = await world.worker()
    seq = await world.grant(worker, request(prompt=PROMPT))
    (end,) = await finished(world)
    kinds = [type(message) for message in world.log]
    assert kinds[0] is Accepted
    assert kinds[-1] is Finished
    assert set(kinds[1:-1]) == {Deltas}
    assert world.tokens() == expected(PROMPT, 8)
    assert world.deltas()[-1].reason is Reason.LENGTH
    assert (end.seq, end.reason, end.prompt_tokens, end.output_tokens) == (seq, Reason.LENGTH, 40, 8)
    assert seq not in world.broker.requests
    (result,) = world.broker.results.values()
    assert (result.worker, result.reason, result.output_tokens) == ("w0", Reason.LENGTH, 8)


async def test_the_first_delta_tells_the_cached_tokens_and_no_later_one_does(world: World) -> None:
    worker = await world.worker()
    await world.grant(worker, request())
    await finished(world)
    assert [delta.cached_tokens for delta in world.deltas()] == [0] + [None] * 7


async def test_one_step_makes_one_message_for_each_gateway(world: World) -> None:
    worker = await world.worker(timing=SLOW)
    for name in "abc":
        await world.grant(worker, request(name))
    await finished(world, 3)
    assert len(world.gateway.of(Deltas)) <= 9
    assert max(len(message.items) for message in world.gateway.of(Deltas)) == 3


async def test_a_request_too_large_for_its_grant_is_fetched(world: World) -> None:
    worker = await world.worker()
    await world.grant(worker, request(prompt=PROMPT), inline=False)
    await finished(world)
    assert world.tokens() == expected(PROMPT, 8)


async def test_a_grant_of_a_request_that_is_gone_ends_as_cancelled(world: World) -> None:
    worker = await world.worker()
    seq = await world.bus.accept(request(), "t", "i")
    await world.bus.discard(seq)
    await world.grant(worker, request(), seq=seq, inline=False)
    (end,) = await finished(world)
    assert (end.seq, end.reason) == (seq, Reason.CANCELLED)


async def test_a_fetch_that_the_bus_does_not_answer_is_a_refusal(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = await world.worker()

    async def down(seq: int) -> None:
        raise BusUnavailable("no answer")

    monkeypatch.setattr(worker._bus, "fetch", down)
    await world.grant(worker, request(), inline=False)
    await until(lambda: world.events.of(Refused))
    assert world.events.of(Refused)[0].retry
    assert worker.state.idle


async def test_a_resumed_attempt_counts_on_from_its_offset(world: World) -> None:
    worker = await world.worker()
    before = expected(PROMPT, 3)
    item = request(prompt=[*PROMPT, *before], max_tokens=5, offset=3, attempt=1)
    await world.grant(worker, item)
    (end,) = await finished(world)
    assert [delta.offset for delta in world.deltas()] == [3, 4, 5, 6, 7]
    assert [t for delta in world.deltas() for t in delta.tokens] == expected(PROMPT, 8)[3:]
    assert (end.prompt_tokens, end.output_tokens) == (43, 5)
    (result,) = world.broker.results.values()
    assert (result.prompt_tokens, result.output_tokens) == (40, 8)


# -- what is refused


async def refused(world: World) -> Refused:
    await until(lambda: world.events.of(Refused))
    assert not world.events.of(Accepted)
    return world.events.of(Refused)[0]


async def test_a_grant_of_an_older_epoch_is_refused(world: World) -> None:
    worker = await world.worker()
    world.control(Sync(epoch=5, router="x"))
    await world.grant(worker, request(), epoch=4)
    assert "epoch 4" in (await refused(world)).reason


async def test_a_request_for_another_engine_api_is_refused_for_good(world: World) -> None:
    worker = await world.worker()
    await world.grant(worker, request(api="vllm-0.1"))
    assert not (await refused(world)).retry


async def test_a_body_that_the_engine_cannot_read_is_refused_for_good(world: World) -> None:
    worker = await world.worker()
    await world.grant(worker, request(body=b"nonsense"))
    assert not (await refused(world)).retry
    assert worker.state.idle


@pytest.mark.parametrize("tokens", [300, 2000])
async def test_a_prompt_that_cannot_fit_is_refused_for_good(world: World, tokens: int) -> None:
    worker = await world.worker(pages=10)
    await world.grant(worker, request(prompt=[1] * tokens))
    assert not (await refused(world)).retry


async def test_a_grant_beyond_the_slots_is_refused_and_may_run_elsewhere(world: World) -> None:
    worker = await world.worker(slots=1, timing=SLOW)
    await world.grant(worker, request("a"))
    await world.grant(worker, request("b"))
    await until(lambda: world.events.of(Refused))
    assert world.events.of(Refused)[0].retry
    assert len(await finished(world)) == 1


async def test_a_stage_of_another_role_is_refused(world: World) -> None:
    worker = await world.worker(Role.PREFILL)
    await world.grant(worker, request(), stage=Stage.DECODE)
    assert (await refused(world)).retry


async def test_a_grant_delivered_twice_runs_once_and_is_answered_again(world: World) -> None:
    worker = await world.worker(timing=SLOW)
    seq = await world.grant(worker, request())
    await world.grant(worker, request(), seq=seq)
    await finished(world)
    await world.grant(worker, request(), seq=seq)
    await finished(world, 2)
    assert len(world.events.of(Accepted)) == 2
    assert world.events.of(Finished)[0] == world.events.of(Finished)[1]
    assert world.tokens() == expected([1, 2, 3, 4, 5], 8)


# -- handoff


async def handed_off(world: World, prefill_options: dict[str, Any] | None = None, **fields: Any) -> HandedOff:
    worker = await world.worker(Role.PREFILL, **(prefill_options or {}))
    await world.grant(worker, request(prompt=PROMPT, **fields))
    await until(lambda: world.events.of(HandedOff))
    return world.events.of(HandedOff)[0]


async def test_prefill_streams_the_first_token_before_it_hands_off(world: World) -> None:
    handoff = await handed_off(world)
    assert [type(message) for message in world.log] == [Accepted, Deltas, HandedOff]
    assert handoff.tokens == world.tokens() == expected(PROMPT, 1)
    assert (handoff.pages, handoff.lease_s) == (3, 30.0)
    assert world.deltas()[0].cached_tokens == 0
    assert len(world.broker.requests) == 1


async def test_decode_goes_on_behind_the_first_token_and_frees_the_prefill_workers_pages(world: World) -> None:
    handoff = await handed_off(world)
    decode = await world.worker(Role.DECODE)
    await world.grant(decode, request(prompt=PROMPT), seq=handoff.seq, handoff=handoff)
    (end,) = await finished(world)
    assert world.tokens() == expected(PROMPT, 8)
    assert (end.worker, end.stage, end.output_tokens) == ("w1", Stage.DECODE, 8)
    await until(lambda: world.workers[0][0].state.idle)
    assert pages_free(world) == 128


async def test_of_a_whole_output_request_only_the_decode_worker_sends_tokens(world: World) -> None:
    handoff = await handed_off(world, whole_output=True)
    assert (handoff.tokens, world.deltas()) == ([], [])
    decode = await world.worker(Role.DECODE)
    await world.grant(decode, request(prompt=PROMPT, whole_output=True), seq=handoff.seq, handoff=handoff)
    await finished(world)
    assert world.tokens() == expected(PROMPT, 8)
    assert world.deltas()[0].cached_tokens == 0


async def test_a_prefill_that_ends_with_its_first_token_completes_the_request(world: World) -> None:
    worker = await world.worker(Role.PREFILL)
    seq = await world.grant(worker, request(prompt=PROMPT, max_tokens=1))
    (end,) = await finished(world)
    assert (end.stage, end.reason) == (Stage.PREFILL, Reason.LENGTH)
    assert not world.events.of(HandedOff)
    assert seq not in world.broker.requests


async def test_a_handoff_that_nobody_takes_is_given_up_with_its_lease(world: World) -> None:
    await handed_off(world, {"lease_s": 0.1})
    await until(lambda: world.workers[0][0].state.idle)
    assert pages_free(world) == 64
    await until(lambda: not world.last_beat().running)


async def test_a_new_leader_hears_the_inventory_and_the_handoffs_again_with_what_is_left_of_the_lease(
    world: World,
) -> None:
    first = await handed_off(world)
    await asyncio.sleep(0.02)
    world.control(Sync(epoch=7, router="new"))
    await until(lambda: len(world.events.of(HandedOff)) == 2)
    second = world.events.of(HandedOff)[1]
    assert second.params == first.params
    assert second.lease_s < first.lease_s
    await until(lambda: world.last_beat().epoch == 7)
    (line,) = world.last_beat().running
    assert (line.seq, line.stage, line.held) == (first.seq, Stage.PREFILL, True)


async def test_a_prefill_granted_again_while_its_pages_are_held_is_answered_with_the_handoff(world: World) -> None:
    first = await handed_off(world)
    await world.grant(world.workers[0][0], request(prompt=PROMPT), seq=first.seq, epoch=2)
    await until(lambda: len(world.events.of(HandedOff)) == 2)
    assert len(world.events.of(Accepted)) == 1


# -- cancellation


async def test_cancelling_what_runs_frees_its_pages_and_leaves_the_request_to_the_gateway(world: World) -> None:
    worker = await world.worker(timing=SLOW)
    await world.grant(worker, request(prompt=PROMPT, max_tokens=500))
    await until(lambda: len(world.deltas()) > 2)
    world.control(Cancel(request_ids=["r1", "unknown"]))
    (end,) = await finished(world)
    assert end.reason is Reason.CANCELLED
    assert pages_free(world) == 64
    assert not world.broker.results


async def test_cancelling_a_held_handoff_frees_its_pages(world: World) -> None:
    await handed_off(world)
    world.control(Cancel(request_ids=["r1"]))
    (end,) = await finished(world)
    assert (end.stage, end.reason) == (Stage.PREFILL, Reason.CANCELLED)
    assert pages_free(world) == 64


async def test_cancelling_before_the_engine_started_it_frees_its_pages(world: World) -> None:
    worker = await world.worker(slots=2, timing=SLOW, step_tokens=16)
    await world.grant(worker, request("a", prompt=[1] * 600))
    await world.grant(worker, request("r1", prompt=PROMPT))
    await until(lambda: len(world.events.of(Accepted)) == 2)
    world.control(Cancel(request_ids=["r1", "a"]))
    await finished(world, 2)
    assert pages_free(world) == 64
    assert worker.state.idle


async def test_cancelling_during_the_transfer_frees_the_pages_of_both(world: World) -> None:
    handoff = await handed_off(world)
    decode = await world.worker(Role.DECODE, timing=replace(FAST, transfer_bits_per_s=1e6))
    await world.grant(decode, request(prompt=PROMPT), seq=handoff.seq, handoff=handoff)
    await until(lambda: decode._engine.load().pages_free < 64)
    world.control(Cancel(request_ids=["r1"]))
    await finished(world, 2)
    assert pages_free(world) == 128


async def test_a_grant_after_the_cancellation_is_not_run(world: World) -> None:
    worker = await world.worker()
    world.control(Cancel(request_ids=["r1"]))
    await world.grant(worker, request())
    (end,) = await finished(world)
    assert end.reason is Reason.CANCELLED
    assert not world.events.of(Accepted)


async def test_a_higher_attempt_ends_the_lower_and_a_lower_one_is_not_run(world: World) -> None:
    worker = await world.worker(timing=SLOW)
    await world.grant(worker, request(max_tokens=500))
    await until(lambda: world.deltas())
    seq = await world.grant(worker, request(attempt=2, max_tokens=20))
    await world.grant(worker, request(attempt=1, max_tokens=20))
    ends = await finished(world, 3)
    by_attempt = {end.attempt: end for end in ends}
    assert by_attempt[0].reason is by_attempt[1].reason is Reason.CANCELLED
    assert (by_attempt[2].seq, by_attempt[2].reason) == (seq, Reason.LENGTH)


# -- the end of a worker


class MortalEngine(SimulatedEngine):
    """Dies when told to."""

    def __init__(self, sizes: SimulatedSettings) -> None:
        super().__init__(sizes)
        self.death = asyncio.Event()

    async def step(self) -> Step:
        stepping, dying = asyncio.create_task(super().step()), asyncio.create_task(self.death.wait())
        try:
            await asyncio.wait((stepping, dying), return_when=asyncio.FIRST_COMPLETED)
            if dying.done():
                raise EngineDied("out of luck")
            return stepping.result()
        finally:
            stepping.cancel()
            dying.cancel()


async def test_when_the_engine_dies_all_its_work_is_reported_as_failed_and_run_raises(world: World) -> None:
    engine = MortalEngine(settings(timing=SLOW))
    worker = await world.worker(engine=engine)
    for name in "ab":
        await world.grant(worker, request(name, max_tokens=500))
    await until(lambda: len(world.events.of(Accepted)) == 2)
    engine.death.set()
    with pytest.raises(WorkerDied, match="out of luck"):
        await asyncio.wait_for(world.workers[0][1], 5)
    await until(lambda: len(world.events.of(Failed)) == 2)
    await worker.stop()
    await until(lambda: world.last_beat().leaving)


async def test_a_draining_worker_refuses_grants_finishes_what_runs_and_leaves(world: World) -> None:
    worker = await world.worker(timing=SLOW)
    await world.grant(worker, request("a", max_tokens=20))
    await until(lambda: world.deltas("a"))
    draining = asyncio.create_task(worker.drain(10))
    await until(lambda: world.last_beat().draining)
    await world.grant(worker, request("b"))
    await until(lambda: world.events.of(Refused))
    assert world.events.of(Refused)[0].retry
    await draining
    assert world.tokens("a") == expected([1, 2, 3, 4, 5], 20)
    await until(lambda: world.last_beat().leaving)
    assert not world.events.of(Failed)


async def test_a_draining_worker_waits_for_its_held_pages_to_be_read(world: World) -> None:
    handoff = await handed_off(world)
    prefill, decode = world.workers[0][0], await world.worker(Role.DECODE)
    draining = asyncio.create_task(prefill.drain(10))
    await asyncio.sleep(0.05)
    assert not draining.done()
    await world.grant(decode, request(prompt=PROMPT), seq=handoff.seq, handoff=handoff)
    await draining
    await finished(world)
    assert not decode._engine.load().running
    assert world.tokens() == expected(PROMPT, 8)


async def test_what_is_left_at_the_drain_deadline_is_reported_as_failed(world: World) -> None:
    worker = await world.worker(timing=SLOW)
    await world.grant(worker, request(max_tokens=900))
    await until(lambda: world.deltas())
    await worker.drain(0.1)
    await until(lambda: world.events.of(Failed))
    await until(lambda: world.last_beat().leaving)


async def test_stopping_twice_is_harmless(world: World) -> None:
    worker = await world.worker()
    await worker.stop()
    await worker.stop()
    await until(lambda: sum(beat.leaving for beat in world.beats.of(Heartbeat)) == 1)


# -- heartbeats and faults of the bus


async def test_the_heartbeat_tells_credit_and_inventory(world: World) -> None:
    worker = await world.worker(timing=SLOW)
    seq = await world.grant(worker, request(max_tokens=100), epoch=3)
    worker._beater.changed()
    await until(lambda: world.last_beat().running)
    beat = world.last_beat()
    assert (beat.member, beat.role, beat.slots, beat.prefill_tokens) == ("w0", Role.BOTH, 8, 128)
    assert (beat.pages_total, beat.page_tokens, beat.max_model_len, beat.epoch) == (64, 16, 1024, 3)
    assert [(line.seq, line.stage, line.held) for line in beat.running] == [(seq, Stage.WHOLE, False)]


async def test_a_request_stays_in_the_inventory_until_its_result_is_recorded(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = await world.worker()
    release, finish = asyncio.Event(), worker._bus.finish

    async def slow(seq: int, tenant: str, result: Result) -> bool:
        await release.wait()
        return await finish(seq, tenant, result)

    monkeypatch.setattr(worker._bus, "finish", slow)
    seq = await world.grant(worker, request())
    await until(lambda: any(delta.reason for delta in world.deltas()))
    await until(lambda: [line.seq for line in world.last_beat().running] == [seq])
    assert not world.events.of(Finished)
    release.set()
    await finished(world)
    await until(lambda: not world.last_beat().running)


async def test_a_result_that_cannot_be_recorded_is_reported_as_failed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = await world.worker()

    async def down(seq: int, tenant: str, result: Result) -> bool:
        raise BusUnavailable("closed")

    monkeypatch.setattr(worker._bus, "finish", down)
    await world.grant(worker, request())
    await until(lambda: world.events.of(Failed))
    assert worker.state.idle


async def test_a_second_completion_of_a_request_is_not_an_error(world: World) -> None:
    worker = await world.worker()
    seq = await world.bus.accept(request(), "t", "i")
    other = Result(request_id="r1", attempt=0, worker="other", reason=Reason.STOP, prompt_tokens=5, output_tokens=1)
    assert await world.bus.finish(seq, "t", other)
    await world.grant(worker, request(), seq=seq)
    (end,) = await finished(world)
    assert end.reason is Reason.LENGTH
    assert [result.worker for result in world.broker.results.values()] == ["other"]


async def test_a_grant_that_carries_no_request_of_ours_is_refused_for_good(world: World) -> None:
    worker = await world.worker()
    grant = Grant(epoch=1, seq=9, tenant="t", klass="i", stage=Stage.WHOLE, attempt=0, request=b"\x00", handoff=b"")
    for sent in (grant, changed(grant, seq=10, request=b"\x93\x01\x02\x03")):
        world.bus.publish(world.subjects.work("w0"), sent)
    await until(lambda: len(world.events.of(Refused)) == 2)
    assert not any(refusal.retry for refusal in world.events.of(Refused))
    assert worker.alive
