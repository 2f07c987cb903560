"""``max_kv_hbm_gb`` where prefill and decode are apart: a prompt takes what its decode needs too, and moves on."""

from __future__ import annotations

import pytest

from llmserve.bus.flow.actions import Action
from llmserve.bus.flow.events import Event, MemberLost
from llmserve.bus.flow.settings import RouterSettings
from llmserve.bus.messages import (
    AttemptLost,
    Cancel,
    Failed,
    HandedOff,
    Heartbeat,
    Prefilling,
    Refused,
    Rejected,
    Role,
    Running,
    Stage,
)
from tests.bus.flow.test_core import Driver, accepted, finished, grants, handed_off, notices, queued
from tests.bus.flow.world import beat

PAGE_BYTES = 1000
TOKENS = 16 * 10 - 16
"""Of a prompt whose prefill takes ten pages, its first token included, and whose decode takes ten."""


def prefill(**more: object) -> Heartbeat:
    return beat("p", Role.PREFILL, **{"slots": 16, "prefill_tokens": 2000, **more})


def decode(**more: object) -> Heartbeat:
    return beat("d", Role.DECODE, **{"slots": 16, **more})


def driver(pages: int) -> Driver:
    d = Driver(RouterSettings(max_kv_hbm_bytes=pages * PAGE_BYTES))
    d.tell(prefill(), decode())
    return d


def ask(*seqs: int, prompt_tokens: int = TOKENS) -> list[Event]:
    return [queued(seq, prompt_tokens=prompt_tokens, max_tokens=16) for seq in seqs]


def granted(actions: list[Action], stage: Stage) -> list[int]:
    return [seq for _, seq, at in grants(actions) if at is stage]


def left_pages(d: Driver) -> float:
    return d.core.ledger.budgets.kv_hbm_left(d.core.ledger.workers.values()) / PAGE_BYTES


def prefilled(d: Driver, seq: int) -> list[Action]:
    return d.tell(accepted("p", seq, Stage.PREFILL), handed_off("p", seq))


def test_a_prompt_is_prefilled_only_if_its_decode_has_room_too() -> None:
    d = driver(pages=60)
    assert granted(d.tell(*ask(*range(1, 7))), Stage.PREFILL) == [1, 2, 3]


def test_all_prompts_of_a_full_budget_are_decoded_as_soon_as_they_are_prefilled() -> None:
    d = driver(pages=60)
    running, done = granted(d.tell(*ask(*range(1, 13))), Stage.PREFILL), []
    while running:
        seq = running.pop(0)
        actions = prefilled(d, seq)
        assert granted(actions, Stage.DECODE) == [seq]
        running += granted(actions, Stage.PREFILL)
        d.tell(accepted("d", seq, Stage.DECODE))
        running += granted(d.tell(finished("d", seq, Stage.DECODE)), Stage.PREFILL)
        done.append(seq)
    assert sorted(done) == list(range(1, 13))


def test_a_prompt_whose_prefill_and_decode_together_exceed_the_budget_is_rejected() -> None:
    d = driver(pages=60)
    (notice,) = notices(d.tell(*ask(1, prompt_tokens=16 * 40)))
    assert isinstance(notice, Rejected)
    assert notice.code == "unservable"


def test_a_prompt_that_fits_the_budget_alone_is_served_once_the_others_are_done() -> None:
    d = driver(pages=60)
    assert granted(d.tell(*ask(1)), Stage.PREFILL) == [1]
    assert grants(d.tell(*ask(2, prompt_tokens=16 * 28))) == []
    prefilled(d, 1)
    d.tell(accepted("d", 1, Stage.DECODE))
    assert granted(d.tell(finished("d", 1, Stage.DECODE)), Stage.PREFILL) == [2]
    assert granted(prefilled(d, 2), Stage.DECODE) == [2]


def test_a_worker_of_both_roles_takes_a_prompts_pages_once() -> None:
    d = Driver(RouterSettings(max_kv_hbm_bytes=60 * PAGE_BYTES))
    d.tell(beat("w", Role.BOTH, slots=16))
    assert granted(d.tell(*ask(*range(1, 9))), Stage.WHOLE) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "end",
    [
        MemberLost("p"),
        Failed(worker="p", seq=1, request_id="q1", attempt=0, stage=Stage.PREFILL, error="boom"),
        finished("p", 1, Stage.PREFILL),
        Refused(worker="p", seq=1, attempt=0, stage=Stage.PREFILL, reason="no", retry=False),
    ],
)
def test_however_a_prefill_ends_what_was_set_aside_for_its_decode_is_free_again(end: Event) -> None:
    d = driver(pages=60)
    d.tell(*ask(1))
    assert left_pages(d) == 40
    d.tell(end)
    assert left_pages(d) == 60


def test_a_handoff_that_is_cancelled_while_it_waits_gives_back_what_was_set_aside() -> None:
    d = driver(pages=60)
    d.tell(decode(slots=0), *ask(1))
    prefilled(d, 1)
    assert left_pages(d) == 40
    d.tell(Cancel(request_ids=["q1"]))
    assert left_pages(d) == 60


def test_a_handoff_whose_lease_ends_gives_back_what_was_set_aside() -> None:
    d = driver(pages=60)
    d.tell(decode(slots=0), *ask(1))
    prefilled(d, 1)
    held = [Running(seq=1, attempt=0, stage=Stage.PREFILL, held=True)]
    lost: list[object] = []
    while not lost:
        lost = [
            n for n in notices(d.later(1.0, prefill(running=held), decode(slots=0))) if isinstance(n, AttemptLost)
        ]
    assert left_pages(d) == 60


def test_a_decode_that_is_refused_keeps_its_room_for_the_next_try() -> None:
    d = driver(pages=40)
    d.tell(*ask(1, 2))
    assert granted(prefilled(d, 1), Stage.DECODE) == [1]
    # The freed prefill of the first is what a third would take; its decode's ten pages are not.
    d.tell(*ask(3))
    d.tell(Refused(worker="d", seq=1, attempt=0, stage=Stage.DECODE, reason="busy"))
    assert left_pages(d) == 0
    assert granted(d.tell(decode()), Stage.DECODE) == [1]


def test_outputs_that_grew_beyond_what_was_reserved_do_not_keep_handoffs_from_their_decode() -> None:
    d = driver(pages=60)
    d.tell(*ask(1))
    d.tell(prefill(pages_free=90), decode(pages_free=50))
    assert left_pages(d) < 0
    assert granted(prefilled(d, 1), Stage.DECODE) == [1]


def test_a_decode_that_fetches_pages_ahead_is_counted_once() -> None:
    d = driver(pages=60)
    d.tell(*ask(1), accepted("p", 1, Stage.PREFILL))
    d.tell(Prefilling(worker="p", seq=1, request_id="q1", attempt=0, params=b""))
    assert list(d.core.ledger.workers["d"].reserved) == [1]
    assert left_pages(d) == 40


def test_when_the_worker_that_fetched_ahead_dies_its_room_is_set_aside_for_another() -> None:
    d = driver(pages=60)
    d.tell(*ask(1), accepted("p", 1, Stage.PREFILL))
    d.tell(Prefilling(worker="p", seq=1, request_id="q1", attempt=0, params=b""), MemberLost("d"))
    assert left_pages(d) == 40


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (2, 0, 1)])
@pytest.mark.parametrize("held", [False, True])
def test_a_new_leader_sets_aside_what_the_one_before_it_had(order: tuple[int, ...], held: bool) -> None:
    d = Driver(RouterSettings(max_kv_hbm_bytes=60 * PAGE_BYTES))
    line = Running(
        seq=1, attempt=0, stage=Stage.PREFILL, held=held, tenant="a", prompt_tokens=TOKENS, max_tokens=16
    )  # fmt: skip
    # No decode worker has been heard yet, and a fixed number of pages is in use whether they are held or computed.
    events: list[Event] = [prefill(running=[line], pages_free=90), ask(1)[0], HandedOff(
        worker="p", seq=1, request_id="q1", attempt=0, tokens=[1], pages=10, page_bytes=PAGE_BYTES, lease_s=30.0,
        params=b"",
    )]  # fmt: skip
    for number in order:
        if held or number != 2:
            d.core.handle(events[number], d.now_s)
            d.core.check()
    assert left_pages(d) == 40
