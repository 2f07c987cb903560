"""Members that die: who is called gone and when, and what becomes of a request that kills its workers."""

from __future__ import annotations

from msgspec.structs import replace

from llmserve.bus.flow.actions import Broadcast, Discard
from llmserve.bus.flow.events import Absent, MemberLost, StreamRead, Tick
from llmserve.bus.messages import AttemptLost, Cancel, Failed, Heartbeat, Rejected, Role, Stage
from tests.bus.flow.test_core import Driver, accepted, grants, notices, queued
from tests.bus.flow.world import beat, request, stored


def failed(worker: str, seq: int, *, died: bool) -> Failed:
    return Failed(worker=worker, seq=seq, request_id=f"q{seq}", attempt=0, stage=Stage.WHOLE, error="boom", died=died)


def rejected(driver_actions: list[AttemptLost | Rejected]) -> list[tuple[str, str]]:
    return [(notice.request_id, notice.code) for notice in driver_actions if isinstance(notice, Rejected)]


def deaths(driver_actions: list[AttemptLost | Rejected]) -> dict[str, int]:
    return {notice.request_id: notice.deaths for notice in driver_actions if isinstance(notice, AttemptLost)}


def run_on(d: Driver, worker: str, *attempts: tuple[int, str, int, int]) -> None:
    """``(seq, request id, attempt, deaths)`` of each that is to run on a fresh worker."""
    d.tell(beat(worker, Role.BOTH))
    for seq, request_id, attempt, died in attempts:
        of = replace(request(request_id, attempt), deaths=died)
        d.tell(stored(seq, f"tenant of {request_id}", of))
        d.tell(accepted(worker, seq, Stage.WHOLE, attempt))


def test_a_request_that_ended_two_workers_is_rejected() -> None:
    d = Driver()
    run_on(d, "w1", (1, "q1", 0, 0))
    assert deaths(notices(d.tell(MemberLost("w1")))) == {"q1": 1}
    run_on(d, "w2", (2, "q1", 1, 1))
    actions = d.tell(MemberLost("w2"))
    assert rejected(notices(actions)) == [("q1", "poison")]
    assert Discard(2) in actions
    assert d.core.ledger.entries == {}


def test_whoever_was_there_by_accident_runs_on() -> None:
    d = Driver()
    run_on(d, "w1", (1, "q1", 0, 1), (2, "q2", 0, 0))
    told = notices(d.tell(MemberLost("w1")))
    assert rejected(told) == [("q1", "poison")]
    assert deaths(told) == {"q2": 1}


def test_where_two_are_suspect_they_are_tried_apart_and_the_next_death_tells() -> None:
    d = Driver()
    run_on(d, "w1", (1, "q1", 0, 1), (2, "q2", 0, 1))
    assert deaths(notices(d.tell(MemberLost("w1")))) == {"q1": 2, "q2": 2}
    run_on(d, "w2", (3, "q1", 1, 2), (4, "q2", 1, 2), (5, "q5", 0, 0))
    book = {entry.request_id for entry in d.core.ledger.workers["w2"].book.values()}
    assert book == {"q1", "q5"}
    told = notices(d.tell(MemberLost("w2")))
    assert rejected(told) == [("q1", "poison")]
    assert deaths(told) == {"q5": 1}


def test_a_suspect_that_waits_for_another_holds_up_nobody() -> None:
    d = Driver()
    run_on(d, "w1", (1, "q1", 1, 2), (2, "q2", 1, 2))
    d.later(5.0, beat("w1", Role.BOTH))
    assert grants(d.tell(queued(9, "b"))) == [("w1", 9, Stage.WHOLE)]


def test_an_engine_that_died_of_a_request_counts_and_a_failed_request_does_not() -> None:
    d = Driver()
    run_on(d, "w1", (1, "q1", 0, 0), (2, "q2", 0, 0))
    assert deaths(notices(d.tell(failed("w1", 1, died=False)))) == {"q1": 0}
    assert deaths(notices(d.tell(failed("w1", 2, died=True)))) == {"q2": 1}


def test_all_that_ran_on_a_dead_engine_are_judged_together() -> None:
    d = Driver()
    run_on(d, "w1", (1, "q1", 0, 1), (2, "q2", 0, 0))
    told = notices(d.tell(failed("w1", 2, died=True), failed("w1", 1, died=True)))
    assert rejected(told) == [("q1", "poison")]
    assert deaths(told) == {"q2": 1}


def test_a_worker_that_leaves_in_order_is_no_death() -> None:
    d = Driver()
    run_on(d, "w1", (1, "q1", 0, 1))
    assert deaths(notices(d.tell(beat("w1", Role.BOTH, leaving=True)))) == {"q1": 1}


def test_a_gateway_at_which_nobody_listens_for_a_second_is_gone() -> None:
    d = Driver()
    d.tell(Heartbeat(member="g0", role=Role.GATEWAY, host="h", pid=1), queued(1))
    assert d.tell(Absent("g0")) == []
    d.now_s += 0.9
    actions = d.tell(Absent("g0"))
    assert Broadcast(Cancel(request_ids=["q1"], epoch=1)) in actions
    assert d.core.ledger.entries == {}


def test_a_member_that_is_heard_again_is_not_gone() -> None:
    d = Driver()
    d.tell(beat("w", Role.BOTH), Absent("w"))
    d.now_s += 0.1
    d.tell(beat("w", Role.BOTH))
    d.now_s += 0.15
    d.tell(Absent("w"), Tick())
    assert "w" in d.core.ledger.workers


def test_what_is_stored_no_more_is_over_and_what_is_over_and_stored_is_discarded() -> None:
    d = Driver()
    d.tell(queued(1), queued(2), queued(3), Cancel(request_ids=["q2"]))
    assert d.tell(StreamRead(2, frozenset({1, 2}))) == [Discard(2)]
    assert sorted(d.core.ledger.entries) == [1, 3]
    d.tell(StreamRead(3, frozenset({3})))
    assert sorted(d.core.ledger.entries) == [3]
