"""The scheduler side against a bare stand-in of vLLM's requests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest

from llmserve.workers.connector.at_once import AtOnce
from llmserve.workers.connector.leases import lease_over
from llmserve.workers.connector.meta import RankMeta, Said
from llmserve.workers.connector.scheduler import SchedulerSettings, SchedulerSide
from llmserve.workers.connector.wire import HANDOFF, HOLD, RELEASE, Handoff, decode_handoff, encode

PAGE = 16
SETTINGS = SchedulerSettings(
    engine_id="e", lease_s=30.0, tp=1, pp=1, groups=(0,), page_tokens=(PAGE,), slots=4, ahead=True
)


@dataclass
class Asked:
    """As much of vLLM's ``Request`` as the side looks at."""

    request_id: str
    num_prompt_tokens: int
    kv_transfer_params: dict[str, Any] = field(default_factory=dict)
    num_computed_tokens: int = 0


@dataclass
class Blocks:
    """As much of ``KVCacheBlocks``."""

    pages: list[int]

    def get_block_ids(self) -> tuple[list[int]]:
        return (self.pages,)


@dataclass
class Output:
    """As much of ``KVConnectorOutput``."""

    finished_sending: set[str] | None = None
    kv_connector_worker_meta: Said | None = None


class Side(SchedulerSide):
    """With ``evicted`` pages, and leases that ``stand`` or do not."""

    def __init__(self) -> None:
        self.evicted: set[int] = set()
        self.stand = True
        at_once = AtOnce(100, 1, lambda _: self.stand)
        super().__init__(SETTINGS, lambda _: ([7, 8, 9],), at_once, self.evicted.update)


@pytest.fixture
def side() -> Side:
    made = Side()
    made.set_ranks({(0, 0): RankMeta("kind", b"rank")})
    return made


def prefill(side: SchedulerSide, name: str, tokens: int, pages: list[int]) -> Handoff:
    request = Asked(name, tokens, {HOLD: True})
    side.on_new_request(request)
    side.allocated(request, Blocks(pages), 0)
    held, params = side.finished(request, (pages,), hold=True)
    assert held
    assert params is not None
    return decode_handoff(params[HANDOFF])


def decode(side: SchedulerSide, handoff: Handoff, tokens: int, name: str = "d") -> Asked:
    request = Asked(name, tokens, {HANDOFF: encode(handoff)})
    side.on_new_request(request)
    return request


def test_a_lease_is_armed_in_the_step_that_allocates_and_held_after_the_end(side: SchedulerSide) -> None:
    request = Asked("p", 20, {HOLD: True})
    side.on_new_request(request)
    side.allocated(request, Blocks([7, 8]), 0)
    ((slot, token),) = side.take_meta({"x": 1}).arm
    held, params = side.finished(request, ([7, 8],), hold=True)
    handoff = decode_handoff((params or {})[HANDOFF])
    assert held
    assert (handoff.slot, handoff.token, handoff.pages, handoff.tokens) == (slot, token, [[7, 8]], 20)
    assert side.take_meta({}).hold == {"p": (slot, 30.0)}


def test_a_second_allocation_keeps_the_token(side: SchedulerSide) -> None:
    request = Asked("p", 20, {HOLD: True})
    side.allocated(request, Blocks([7, 8]), 0)
    side.allocated(request, Blocks([9, 10]), 0)
    assert len(side.take_meta({"x": 1}).arm) == 1


def test_pages_beyond_the_prompt_are_not_handed_over(side: SchedulerSide) -> None:
    assert prefill(side, "p", PAGE, [3, 4]).pages == [[3]]


def test_a_prefill_that_ended_otherwise_holds_nothing_and_disarms(side: SchedulerSide) -> None:
    request = Asked("p", 20, {HOLD: True})
    side.allocated(request, Blocks([7, 8]), 0)
    ((slot, _),) = side.take_meta({"x": 1}).arm
    assert side.finished(request, ([7, 8],), hold=False) == (False, None)
    assert side.has_work()
    assert side.take_meta({"x": 1}).disarm == [slot]


def test_slots_come_back_when_pages_are_free(side: SchedulerSide) -> None:
    for number in range(3 * SETTINGS.slots):
        prefill(side, f"p{number}", 20, [1, 2])
        side.on_output(Output({f"p{number}"}))
    stats = side.take_stats()
    assert stats is not None
    assert len(stats.data["released"]) == 3 * SETTINGS.slots


def test_without_a_free_slot_nothing_is_held(side: SchedulerSide) -> None:
    for number in range(SETTINGS.slots):
        prefill(side, f"p{number}", 20, [1, 2])
    request = Asked("one more", 20, {HOLD: True})
    side.allocated(request, Blocks([1, 2]), 0)
    assert side.finished(request, ([1, 2],), hold=True) == (False, None)


@pytest.mark.parametrize(("prompt", "cached", "wanted"), [(21, 0, 20), (20, 0, 20), (21, PAGE, 4), (21, 32, 0)])
def test_what_is_not_cached_here_is_to_be_read(side: SchedulerSide, prompt: int, cached: int, wanted: int) -> None:
    request = decode(side, prefill(side, "p", 20, [7, 8]), prompt)
    assert side.matched_tokens(request, cached) == (wanted, wanted > 0)
    assert side.matched_tokens(request, cached) == (wanted, wanted > 0), "asked again, it answers the same"


def test_only_the_missing_pages_are_read(side: SchedulerSide) -> None:
    request = decode(side, prefill(side, "p", 40, [7, 8, 9]), 41)
    side.allocated(request, Blocks([20, 21, 22]), 40 - PAGE)
    pull = side.take_meta({"x": 1}).pull["d"]
    assert (pull.local, pull.remote) == ([[21, 22]], [[8, 9]])
    assert not pull.refusal


def test_a_handoff_is_read_once_only(side: SchedulerSide) -> None:
    request = decode(side, prefill(side, "p", 20, [7, 8]), 21)
    side.allocated(request, Blocks([20, 21]), 20)
    side.take_meta({"x": 1})
    assert side.matched_tokens(request, 0) == (0, False)
    side.allocated(request, Blocks([20, 21]), 0)
    meta = side.take_meta({"x": 1})
    assert (meta.pull, meta.dismiss) == ({}, [])


def test_a_handoff_that_is_not_needed_is_dismissed(side: SchedulerSide) -> None:
    handoff = prefill(side, "p", 20, [7, 8])
    side.allocated(decode(side, handoff, 21), Blocks([20, 21]), 0)
    assert side.take_meta({"x": 1}).dismiss == [handoff]


def test_a_handoff_of_a_request_that_ends_unread_is_dismissed(side: SchedulerSide) -> None:
    handoff = prefill(side, "p", 20, [7, 8])
    assert side.finished(decode(side, handoff, 21), ([],), hold=False) == (False, None)
    assert side.take_meta({"x": 1}).dismiss == [handoff]


@pytest.mark.parametrize("change", [{"tp": 2}, {"pp": 2}, {"fingerprint": "other"}, {"pages": [[1], [2]]}])
def test_pages_that_do_not_fit_are_refused_and_computed_here(side: SchedulerSide, change: dict[str, Any]) -> None:
    handoff = msgspec.structs.replace(prefill(side, "p", 20, [7, 8]), **change)
    request = decode(side, handoff, 21)
    assert side.matched_tokens(request, 0) == (0, False)
    assert side.take_meta({"x": 1}).failures == ["fingerprint"]


def test_a_page_that_the_producer_dropped_is_a_refusal(side: SchedulerSide) -> None:
    handoff = msgspec.structs.replace(prefill(side, "p", 20, [7, 8]), pages=[[0, 8]])
    side.allocated(decode(side, handoff, 21), Blocks([20, 21]), 20)
    assert "sliding window" in side.take_meta({"x": 1}).pull["d"].refusal


def test_unreadable_handoffs_are_computed_here(side: SchedulerSide) -> None:
    request = Asked("d", 20, {HANDOFF: b"nonsense"})
    side.on_new_request(request)
    assert side.matched_tokens(request, 0) == (0, False)
    assert side.take_meta({"x": 1}).failures == ["other"]


def test_releases_are_passed_on(side: SchedulerSide) -> None:
    side.on_new_request(Asked("x", 1, {RELEASE: ["p"]}))
    assert side.has_work()
    assert side.take_meta({}).release == ["p"]
    assert not side.has_work()


def test_ranks_of_different_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="different KV layouts"):
        Side().set_ranks({(0, 0): RankMeta("a", b""), (0, 1): RankMeta("b", b"")})


@pytest.mark.parametrize(("age_s", "over"), [(0.0, False), (8.9, False), (9.1, True), (99.0, True)])
def test_a_read_needs_some_of_its_lease_left(age_s: float, over: bool) -> None:
    assert lease_over(10.0, age_s) is over


def offered(side: SchedulerSide) -> list[Handoff]:
    stats = side.take_stats()
    return [decode_handoff(data) for _, data in stats.data["ahead"]] if stats else []


def half_way(side: SchedulerSide, tokens: int = 40) -> Asked:
    """A prompt of 48 tokens of which ``tokens`` are computed in the step that begins."""
    request = Asked("p", 48, {HOLD: True})
    side.on_new_request(request)
    side.allocated(request, Blocks([7, 8, 9]), 0)
    return request


def test_full_pages_of_a_prompt_are_offered_when_their_step_has_ended(side: SchedulerSide) -> None:
    half_way(side)
    meta = side.take_meta({"p": 40})
    ((slot, token),) = meta.arm
    assert meta.computed == {"p": 40}
    assert not offered(side)
    side.on_output(Output(kv_connector_worker_meta=Said(meta.computed)))
    (handoff,) = offered(side)
    assert (handoff.tokens, handoff.pages, handoff.slot, handoff.token) == (32, [[7, 8]], slot, token)
    assert handoff.ahead


def test_a_prompt_of_one_step_and_its_last_chunk_are_not_offered(side: SchedulerSide) -> None:
    request = half_way(side)
    request.num_computed_tokens = 32
    assert not side.take_meta({"p": 16}).computed
    assert not side.take_meta({"p": 1}).computed


def test_a_prompt_that_gives_way_loses_its_token_before_the_next_step_writes(side: SchedulerSide) -> None:
    request = half_way(side)
    meta = side.take_meta({"p": 40})
    ((slot, token),) = meta.arm
    assert side.take_meta({"x": 1}, preempted={"p"}).disarm == [slot]
    side.on_output(Output(kv_connector_worker_meta=Said(meta.computed)))
    assert not offered(side)
    side.allocated(request, Blocks([1, 2, 3]), 0)
    assert side.take_meta({"p": 40}).arm[0][1] != token


def test_a_prompt_that_is_cancelled_offers_nothing_more(side: SchedulerSide) -> None:
    request = half_way(side)
    meta = side.take_meta({"p": 40})
    side.finished(request, ([7, 8, 9],), hold=False)
    side.on_output(Output(kv_connector_worker_meta=Said(meta.computed)))
    assert not offered(side)
    assert side.take_meta({}).disarm == [meta.arm[0][0]]


def test_who_reads_ahead_computes_nothing_itself(side: SchedulerSide) -> None:
    handoff = msgspec.structs.replace(prefill(side, "p", 32, [7, 8]), ahead=True, tokens=32)
    request = decode(side, handoff, 33)
    assert side.matched_tokens(request, 0) == (32, True)
    side.allocated(request, Blocks([1, 2, 3]), 32)
    # The read has failed: vLLM asks again.
    assert side.matched_tokens(request, 0) == (None, False)
    side.finished(request, ([1, 2, 3],), hold=False)
    assert not side.take_meta({}).dismiss


def near(side: Side, prompt: int = 41) -> Asked:
    """A request whose pages are on this host."""
    handoff = prefill(side, "p", 40, [7, 8, 9])
    side.take_meta({})
    side.on_output(Output(kv_connector_worker_meta=Said(near={("e", "0/0")})))
    return decode(side, handoff, prompt)


def test_pages_on_this_host_are_loaded_in_the_step_that_computes_with_them(side: Side) -> None:
    request = near(side)
    assert side.matched_tokens(request, 0) == (40, False)
    side.allocated(request, Blocks([20, 21, 22]), 40)
    (pull,) = side.take_meta({"d": 1}).pull.values()
    assert (pull.at_once, pull.local, pull.remote) == (True, [[20, 21, 22]], [[7, 8, 9]])


def test_a_request_that_runs_at_once_computes_a_token_at_least(side: Side) -> None:
    request = near(side, 40)
    assert side.matched_tokens(request, PAGE) == (40 - 1 - PAGE, False)
    side.allocated(request, Blocks([20, 21, 22]), 40 - 1 - PAGE)
    assert side.take_meta({"d": 1}).pull["d"].local == [[21, 22]]


def test_a_lease_that_does_not_stand_is_read_as_ever(side: Side) -> None:
    request = near(side)
    side.stand = False
    assert side.matched_tokens(request, 0) == (40, True)
    side.allocated(request, Blocks([20, 21, 22]), 40)
    assert not side.take_meta({}).pull["d"].at_once


def test_nobody_uses_pages_that_are_not_certain_yet(side: Side) -> None:
    request = near(side)
    side.matched_tokens(request, 0)
    side.allocated(request, Blocks([20, 21, 22]), 40)
    other = Asked("other", 50)
    assert side.matched_tokens(other, 0) == (0, False)
    assert side.matched_tokens(other, PAGE) == (None, False)
    side.on_output(Output(kv_connector_worker_meta=Said(loaded={"d": True})))
    assert side.matched_tokens(other, PAGE) == (0, False)
    assert side.evicted == set()


def test_what_was_computed_with_pages_that_were_not_good_is_told_and_they_leave_the_cache(side: Side) -> None:
    request = near(side)
    side.matched_tokens(request, 0)
    side.allocated(request, Blocks([20, 21, 22]), 40)
    side.on_output(Output(kv_connector_worker_meta=Said(loaded={"d": False})))
    assert side.evicted == {20, 21, 22}
    stats = side.take_stats()
    assert stats is not None
    assert stats.data["spoilt"] == ["d"]
