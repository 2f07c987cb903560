"""``max_kv_io_gbps``: nothing is prefilled whose handoff would wait for it longer than its lease."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from llmserve.bus.flow.actions import Action
from llmserve.bus.flow.events import Event, MemberLost
from llmserve.bus.flow.settings import RouterSettings
from llmserve.bus.flow.wire import Wire
from llmserve.bus.messages import AttemptLost, Cancel, Failed, HandedOff, Heartbeat, Role, Running, Stage
from tests.bus.flow.test_core import Driver, accepted, finished, grants, notices, queued
from tests.bus.flow.world import beat

RATE = 1000.0
PAGE_BYTES = 160
TOKENS = 100
"""Of a prompt; its handoff is as many times the ten bytes of a token: one second at ``RATE``."""
LEASE_S = 30.0


def prefill(held: set[int] | None = None) -> Heartbeat:
    lines = [Running(seq=seq, attempt=0, stage=Stage.PREFILL, held=True) for seq in held or ()]
    more: dict[str, object] = {"slots": 1000, "prefill_tokens": 10**6, "pages_total": 0, "page_bytes": PAGE_BYTES}
    return beat("p", Role.PREFILL, **more, running=lines)


def decode(running: set[int] | None = None) -> Heartbeat:
    lines = [Running(seq=seq, attempt=0, stage=Stage.DECODE) for seq in running or ()]
    return beat("d", Role.DECODE, slots=256, pages_total=0, running=lines)


def ask(*seqs: int, prompt_tokens: int = TOKENS) -> list[Event]:
    return [queued(seq, prompt_tokens=prompt_tokens) for seq in seqs]


def handoff(seq: int, size_bytes: int = 1000) -> HandedOff:
    return HandedOff(
        worker="p", seq=seq, request_id=f"q{seq}", attempt=0, tokens=[1], pages=1, page_bytes=size_bytes,
        lease_s=LEASE_S, params=b"",
    )  # fmt: skip


def granted(actions: list[Action], stage: Stage = Stage.PREFILL) -> list[int]:
    return [seq for _, seq, at in grants(actions) if at is stage]


def driver(rate: float = RATE) -> Driver:
    d = Driver(RouterSettings(max_kv_io_bytes_per_s=rate))
    d.tell(prefill(), decode())
    return d


@dataclass
class Pool:
    """Workers that do everything at once: only the budget of transfers takes time."""

    d: Driver
    size_bytes: int = 1000
    held: set[int] = field(default_factory=set)
    decoding: set[int] = field(default_factory=set)
    done: list[int] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)

    def live(self, seconds: float, asked: int = 0) -> None:
        """Another ``asked`` requests come each second."""
        for _ in range(round(seconds * 10)):
            first = self.d.core.ledger.entries
            fresh = [1 + max(first, default=0) + len(self.done) + n for n in range(asked)]
            self.take(self.d.later(0.1, prefill(self.held), decode(self.decoding)))
            self.take(self.d.tell(*ask(*fresh)))
            for seq in list(self.decoding):
                self.decoding.discard(seq)
                self.done.append(seq)
                self.take(self.d.tell(finished("d", seq, Stage.DECODE)))

    def take(self, actions: list[Action]) -> None:
        for notice in notices(actions):
            assert isinstance(notice, AttemptLost)
            self.lost.append(notice.seq)
        for seq in granted(actions):
            self.held.add(seq)
            self.take(self.d.tell(accepted("p", seq, Stage.PREFILL), handoff(seq, self.size_bytes)))
        for seq in granted(actions, Stage.DECODE):
            self.held.discard(seq)
            self.decoding.add(seq)
            self.take(self.d.tell(accepted("d", seq, Stage.DECODE)))


def test_with_more_requests_than_the_budget_moves_no_handoff_waits_for_longer_than_its_lease() -> None:
    d = driver()
    pool = Pool(d)
    pool.take(d.tell(*ask(*range(1, 201))))
    pool.live(90.0)
    assert pool.lost == []
    assert 89 <= len(pool.done) <= 92, "the budget is not used up"


def test_prompts_that_are_being_computed_count_as_what_they_will_hand_off() -> None:
    d = driver()
    # At half the rate, which loads leave to handoffs at least, 14 of them move in the 28 s of a lease that count.
    assert granted(d.tell(*ask(*range(1, 31)))) == list(range(1, 15))


def test_the_size_of_what_is_to_come_is_learned_from_what_came() -> None:
    d = driver()
    pool = Pool(d, size_bytes=2000)
    pool.take(d.tell(*ask(1)))
    pool.live(3.0)
    assert pool.done == [1]
    assert granted(d.tell(*ask(*range(2, 31)))) == list(range(2, 9))


def test_a_handoff_that_takes_longer_than_a_lease_is_prefilled_when_nothing_is_before_it() -> None:
    d = driver(rate=100.0)
    assert granted(d.tell(*ask(1, prompt_tokens=900))) == [1]
    assert granted(d.tell(*ask(2))) == []
    d.tell(accepted("p", 1, Stage.PREFILL))
    assert granted(d.tell(handoff(1, 9000)), Stage.DECODE) == [1]


def test_while_a_large_handoff_still_moves_nothing_is_prefilled_that_would_wait_too_long_for_it() -> None:
    d = driver()
    pool = Pool(d, size_bytes=40_000)
    pool.take(d.tell(*ask(1)))
    pool.live(1.0)
    assert pool.done == [1]
    assert granted(d.tell(*ask(2))) == []
    d.now_s += 26.0
    assert granted(d.tell(prefill(), decode())) == [2]


@pytest.mark.parametrize(
    "end",
    [
        MemberLost("p"),
        Failed(worker="p", seq=1, request_id="q1", attempt=0, stage=Stage.PREFILL, error="boom"),
        finished("p", 1, Stage.PREFILL),
    ],
)
def test_however_a_prefill_ends_it_is_before_the_budget_no_more(end: Event) -> None:
    d = driver()
    d.tell(*ask(1), accepted("p", 1, Stage.PREFILL))
    assert d.core.ledger.budgets.wire.ahead_bytes == 1000
    d.tell(end)
    assert d.core.ledger.budgets.wire.ahead_bytes == 0


def test_a_handoff_that_is_cancelled_while_it_waits_is_before_the_budget_no_more() -> None:
    d = driver()
    d.tell(*ask(1, 2), accepted("p", 1, Stage.PREFILL), accepted("p", 2, Stage.PREFILL))
    d.tell(handoff(1), handoff(2, 700))
    assert d.core.ledger.budgets.wire.ahead_bytes == 700
    d.tell(Cancel(request_ids=["q2"]))
    assert d.core.ledger.budgets.wire.ahead_bytes == 0


def test_a_new_leader_knows_what_is_before_the_budget() -> None:
    d = Driver(RouterSettings(max_kv_io_bytes_per_s=RATE))
    d.tell(prefill({1}), ask(1)[0])
    assert d.core.ledger.budgets.wire.ahead_bytes == 1000
    d.tell(handoff(1, 700))
    assert d.core.ledger.budgets.wire.ahead_bytes == 700


def test_workers_of_both_roles_do_not_wait_for_handoffs_to_move() -> None:
    d = driver()
    d.tell(*ask(*range(1, 15)))
    assert len(granted(d.tell(beat("w", Role.BOTH), *ask(15, 16)), Stage.WHOLE)) == 2


def test_however_much_is_loaded_handoffs_have_half_of_the_budget() -> None:
    wire = Wire(RouterSettings(max_kv_io_bytes_per_s=RATE))
    d = driver()
    d.tell(*ask(1, 2))
    load, moves = d.core.ledger.entries[1], d.core.ledger.entries[2]
    load.loaded_bytes, moves.handoff = 5000, handoff(2, 500)
    moved_bytes = 0
    for step in range(1000):
        now_s = step / 10
        if wire.may_pass(moves, now_s):
            wire.passes(moves, now_s)
            moved_bytes += 500
        wire.passes(load, now_s)
    assert moved_bytes >= 0.5 * 100 * RATE - 500


def test_loads_put_the_budget_at_most_a_second_into_debt() -> None:
    d = driver()
    d.tell(*ask(1, 2))
    wire, load, moves = d.core.ledger.budgets.wire, d.core.ledger.entries[1], d.core.ledger.entries[2]
    load.loaded_bytes, moves.handoff = 5000, handoff(2, 1000)
    wire.passes(moves, d.now_s)
    for _ in range(10):
        wire.passes(load, d.now_s)
    assert wire.wait_s(moves, d.now_s) == pytest.approx(2.0)
