"""Decode workers that are granted a prompt's first pages while it is computed: room is set aside, and given back."""

from __future__ import annotations

import pytest

from llmserve.bus.flow.actions import Action, SendAhead
from llmserve.bus.flow.events import Event, MemberLost
from llmserve.bus.messages import Cancel, Failed, Prefilling, Role, Stage, decode
from tests.bus.flow.test_core import Driver, accepted, finished, grants, handed_off, queued
from tests.bus.flow.world import beat


def offer(seq: int = 1, attempt: int = 0) -> Prefilling:
    return Prefilling(worker="p", seq=seq, request_id=f"q{seq}", attempt=attempt, params=b"pages")


def offers(actions: list[Action]) -> list[tuple[str, int, bytes]]:
    told = []
    for action in actions:
        if isinstance(action, SendAhead):
            message = decode(action.grant.handoff)
            assert isinstance(message, Prefilling)
            assert action.grant.ahead
            assert action.grant.stage is Stage.DECODE
            told.append((action.worker, action.grant.seq, message.params))
    return told


def prefilling(*decoders: Event) -> Driver:
    """Request 1 is being computed by worker ``p``."""
    d = Driver()
    d.tell(beat("p", Role.PREFILL), *decoders)
    assert grants(d.tell(queued(1))) == [("p", 1, Stage.PREFILL)]
    d.tell(accepted("p", 1, Stage.PREFILL))
    return d


def reserved(d: Driver, worker: str) -> list[int]:
    return list(d.core.ledger.workers[worker].reserved)


def test_each_offer_goes_to_the_worker_that_decodes_it_later() -> None:
    d = prefilling(beat("d1", Role.DECODE), beat("d2", Role.DECODE))
    ((first, _, _),) = offers(d.tell(offer()))
    assert offers(d.tell(offer())) == [(first, 1, b"pages")]
    assert grants(d.tell(handed_off("p", 1))) == [(first, 1, Stage.DECODE)]
    assert reserved(d, first) == []


def test_what_is_set_aside_is_nobody_elses() -> None:
    d = prefilling(beat("d", Role.DECODE, slots=1))
    assert offers(d.tell(offer()))
    d.tell(queued(2))
    d.tell(accepted("p", 2, Stage.PREFILL))
    assert grants(d.tell(handed_off("p", 2))) == []
    # Both wait for it now, in their order.
    d.tell(handed_off("p", 1))
    assert len(d.core.ledger.workers["d"].book) == 1


@pytest.mark.parametrize("full", [{"slots": 0}, {"draining": True}, {"fingerprint": "other"}])
def test_without_a_decode_worker_that_has_room_nothing_is_sent_ahead(full: dict[str, object]) -> None:
    d = prefilling(beat("d", Role.DECODE))
    d.tell(beat("d", Role.DECODE, **full))
    assert offers(d.tell(offer())) == []


@pytest.mark.parametrize(
    "end",
    [
        MemberLost("p"),
        Failed(worker="p", seq=1, request_id="q1", attempt=0, stage=Stage.PREFILL, error="boom"),
        finished("p", 1, Stage.PREFILL),
    ],
)
def test_however_the_prefill_ends_the_room_is_free_again(end: Event) -> None:
    d = prefilling(beat("d", Role.DECODE))
    d.tell(offer())
    assert reserved(d, "d") == [1]
    d.tell(end)
    assert reserved(d, "d") == []
    assert d.core.ledger.workers["d"].free_pages == 100
    assert offers(d.tell(offer())) == []


def test_a_cancelled_prompt_keeps_its_room_until_its_worker_says_that_it_stopped() -> None:
    d = prefilling(beat("d", Role.DECODE))
    d.tell(offer(), Cancel(request_ids=["q1"]))
    assert offers(d.tell(offer())) == []
    d.tell(finished("p", 1, Stage.PREFILL))
    assert reserved(d, "d") == []


def test_when_the_decode_worker_dies_the_next_offer_goes_to_another() -> None:
    d = prefilling(beat("d1", Role.DECODE))
    d.tell(offer())
    d.tell(MemberLost("d1"), beat("d2", Role.DECODE))
    assert offers(d.tell(offer())) == [("d2", 1, b"pages")]
    assert grants(d.tell(handed_off("p", 1))) == [("d2", 1, Stage.DECODE)]


def test_an_offer_of_an_older_attempt_or_another_worker_is_not_heard() -> None:
    d = prefilling(beat("d", Role.DECODE), beat("p2", Role.PREFILL))
    assert offers(d.tell(offer(attempt=1))) == []
    assert offers(d.tell(Prefilling(worker="p2", seq=1, request_id="q1", attempt=0, params=b""))) == []


def test_while_others_wait_for_a_decode_worker_nobody_gets_one_ahead() -> None:
    d = prefilling(beat("d", Role.DECODE, slots=1))
    for seq in (2, 3):
        d.tell(queued(seq), accepted("p", seq, Stage.PREFILL), handed_off("p", seq))
    d.tell(accepted("d", 2, Stage.DECODE))
    d.tell(beat("d", Role.DECODE, slots=1))
    assert offers(d.tell(offer())) == []
