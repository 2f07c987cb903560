"""Leases on the producer, and the fence."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llmserve.workers.connector.leases import EARLY_KEPT_S, Leases, LeaseTable, new_token

SLOTS = 6


def leases() -> Leases:
    return Leases(LeaseTable(SLOTS))


def test_a_slot_holds_its_token_while_the_lease_lasts() -> None:
    held = leases()
    held.table.arm(2, 77)
    held.hold("a", 2, 10.0, now_s=0.0)
    assert held.expire(9.9) == []
    assert held.table.value(2) == 77


def test_the_slot_is_zero_before_the_end_is_reported() -> None:
    held = leases()
    held.table.arm(2, 77)
    held.hold("a", 2, 10.0, now_s=0.0)
    assert held.expire(10.0) == ["a"]
    assert held.table.value(2) == 0
    assert held.take_ended() == {"a"}


def test_an_end_is_reported_once_however_often_it_is_asked_for() -> None:
    held = leases()
    held.hold("a", 0, 10.0, now_s=0.0)
    held.end("a", 1.0)
    held.end("a", 1.0)
    assert held.take_ended() == {"a"}
    held.end("a", 2.0)
    assert held.take_ended() == set()


def test_an_end_asked_for_before_the_lease_is_known_ends_it_at_once() -> None:
    held = leases()
    held.end("a", 0.0)
    assert held.take_ended() == set()
    held.table.arm(1, 5)
    held.hold("a", 1, 10.0, now_s=1.0)
    assert held.take_ended() == {"a"}
    assert held.table.value(1) == 0


def test_an_end_of_something_unknown_is_forgotten_in_time() -> None:
    held = leases()
    held.end("a", 0.0)
    held.expire(EARLY_KEPT_S + 1)
    held.hold("a", 1, 10.0, now_s=EARLY_KEPT_S + 1)
    assert len(held) == 1


def test_tokens_are_never_zero_and_fit_a_signed_integer() -> None:
    assert all(0 < new_token() < 2**63 for _ in range(1000))


class LeaseMachine(RuleBasedStateMachine):
    """Whatever the order of holds, ends and expiry: reported ids were held, once, and their slots are zero."""

    def __init__(self) -> None:
        super().__init__()
        self.leases = leases()
        self.now_s = 0.0
        self.names = 0
        self.live: dict[str, int] = {}

    @precondition(lambda self: len(self.live) < SLOTS)
    @rule(lease_s=st.floats(0.1, 5))
    def hold(self, lease_s: float) -> None:
        slot = min(set(range(SLOTS)) - set(self.live.values()))
        self.names += 1
        self.leases.table.arm(slot, self.names)
        self.leases.hold(f"r{self.names}", slot, lease_s, self.now_s)
        self.live[f"r{self.names}"] = slot

    @rule(name=st.integers(1, 30))
    def end(self, name: int) -> None:
        if name <= self.names:
            self.leases.end(f"r{name}", self.now_s)

    @rule(pause_s=st.floats(0, 3))
    def wait(self, pause_s: float) -> None:
        self.now_s += pause_s
        self.leases.expire(self.now_s)

    @rule()
    def report(self) -> None:
        for name in self.leases.take_ended():
            slot = self.live.pop(name)
            assert self.leases.table.value(slot) == 0

    @invariant()
    def held_slots_are_zero_or_their_own(self) -> None:
        for name, slot in self.live.items():
            assert self.leases.table.value(slot) in (0, int(name[1:]))


TestLeaseMachine = LeaseMachine.TestCase
