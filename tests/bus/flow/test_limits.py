"""Specification of what ends a wait: the reserve for a request that does not fit, and refusal after a time."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve.bus.flow.actions import SendGrant
from llmserve.bus.flow.entry import Place
from llmserve.bus.flow.settings import RouterSettings
from llmserve.bus.messages import Heartbeat, Rejected, Role, Running, Stage
from tests.bus.flow.test_core import Driver, accepted, finished, grants, notices, queued
from tests.bus.flow.world import beat, request, stored


def pages(seq: int, tenant: str, number: int) -> object:
    """A request that takes so many of a worker's pages of 16 tokens."""
    return queued(seq, tenant, prompt_tokens=16 * number - 1, max_tokens=1)


def test_what_does_not_fit_is_overtaken_for_bypass_s_and_then_everything_freed_is_kept_for_it() -> None:
    d = Driver(RouterSettings(bypass_s=1.0))
    worker = beat("w", Role.BOTH, slots=50, pages_total=10)
    d.tell(worker, *(pages(seq, "small", 2) for seq in range(1, 6)))  # type: ignore[arg-type]
    d.tell(*(accepted("w", seq, Stage.WHOLE) for seq in range(1, 6)))
    assert grants(d.tell(pages(100, "large", 6))) == []  # type: ignore[arg-type]
    waiting = [pages(seq, "small", 2) for seq in range(6, 12)]
    d.tell(*waiting)  # type: ignore[arg-type]
    assert [seq for _, seq, _ in grants(d.tell(finished("w", 1, Stage.WHOLE)))] == [6]
    d.now_s += 0.9
    assert [seq for _, seq, _ in grants(d.tell(finished("w", 2, Stage.WHOLE)))] == [7]
    d.now_s += 0.2
    assert grants(d.tell(finished("w", 3, Stage.WHOLE))) == []
    assert grants(d.tell(finished("w", 4, Stage.WHOLE))) == []
    d.tell(accepted("w", 6, Stage.WHOLE), accepted("w", 7, Stage.WHOLE))
    assert [seq for _, seq, _ in grants(d.tell(finished("w", 5, Stage.WHOLE)))] == [100]
    assert [seq for _, seq, _ in grants(d.tell(finished("w", 6, Stage.WHOLE)))] == [8]


def overdue(d: Driver, seconds: float, *alive: Heartbeat) -> list[str]:
    return [f"{n.code} {n.request_id}" for n in notices(d.later(seconds, *alive)) if isinstance(n, Rejected)]


def test_a_request_that_has_not_begun_in_time_is_rejected_if_the_manifest_says_so() -> None:
    d = Driver(RouterSettings(reject_after_s=10.0))
    running = beat("w", Role.BOTH, slots=1, running=[Running(1, 0, Stage.WHOLE)])
    d.tell(beat("w", Role.BOTH, slots=1), queued(1))
    d.tell(accepted("w", 1, Stage.WHOLE), queued(2), stored(3, "a", request("q3", attempt=1)))
    d.tell(stored(4, "a", request("q4"), "batch"))
    for _ in range(4):
        assert overdue(d, 2.4, running) == []
    assert overdue(d, 0.5, running) == ["overdue q2"]
    assert overdue(d, 1.0, running) == []
    assert grants(d.tell(finished("w", 1, Stage.WHOLE))) == [("w", 3, Stage.WHOLE)]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1 << 30))
def test_under_overload_nothing_begins_later_than_reject_after_s_and_a_tick(seed: int) -> None:
    rng, tick_s = random.Random(seed), 0.25
    limit_s = rng.choice((1.0, 3.0, 8.0))
    d = Driver(RouterSettings(reject_after_s=limit_s, aging_tokens_per_s=0.0))
    running: list[int] = []
    came_s: dict[int, float] = {}
    begun, refused = 0, 0
    for step in range(1, 100):
        for number in range(rng.randint(0, 3)):
            seq = 10 * step + number
            came_s[seq] = d.now_s
            actions = d.tell(queued(seq, rng.choice("aab"), rng.choice((10, 90)), 10))
            running += [a.grant.seq for a in actions if isinstance(a, SendGrant)]
        actions = d.later(tick_s, beat("w", Role.BOTH, slots=4, pages_total=0))
        if running:
            actions += d.tell(finished("w", running.pop(rng.randrange(len(running))), Stage.WHOLE))
        refused += len(notices(actions))
        for action in actions:
            if isinstance(action, SendGrant):
                begun += 1
                running.append(action.grant.seq)
                assert d.now_s - came_s[action.grant.seq] <= limit_s + tick_s + 1e-9
        queued_entries = [e for e in d.core.ledger.entries.values() if e.place is Place.QUEUED]
        assert all(d.now_s - entry.seen_s <= limit_s + 1e-9 for entry in queued_entries)
    assert begun > 0
    assert refused > 0
