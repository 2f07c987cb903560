"""The ladder at work: two movers over two real engines that fail as ordered."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import pytest

from llmserve.kvstore.transfer import open_engine, unavailable
from llmserve.kvstore.transfer.base import EngineOptions, Place, Region, Run
from llmserve.kvstore.transfer.ladder import COOL_DOWN_S, SLOW_IN_A_ROW, Rung
from llmserve.kvstore.transfer.mover import Mover
from llmserve.kvstore.transfer.orders import Ends, Fetch, Fetched
from llmserve.kvstore.transfer.pacing import TokenBucket
from llmserve.kvstore.transfer.processes import host_identity
from tests.kvstore.faulty import Clock, Fault, FaultyEngine

pytestmark = pytest.mark.skipif(unavailable("ucx") is not None, reason=f"UCX: {unavailable('ucx')}")

T = TypeVar("T")
HOST = Place()
PAGE = 65536
PAGES = 32
PROBE = 1 << 20
FIRST, SECOND = "same_host", "ucx"
A, B = Rung(FIRST, "pull"), Rung(SECOND, "pull")
A_PUSH, B_PUSH = Rung(FIRST, "push"), Rung(SECOND, "push")


class End:
    """A mover with pages, a word for the fence, and memory for probes."""

    def __init__(
        self, *, fingerprint: str = "f", probes: bool = False, rate: float = math.inf, clock: Clock | None = None
    ) -> None:
        """By ``clock``, if there is one, the first engine moves twice as many bytes a second as the other."""
        self.pages = np.zeros((PAGES, PAGE), dtype=np.uint8)
        self.word = np.zeros(1, dtype=np.uint64)
        self.scratch = np.zeros(2 * PROBE, dtype=np.uint8)
        options = EngineOptions(fingerprint=fingerprint)
        self.engines = {
            name: FaultyEngine(open_engine(name, options), clock, bytes_s)
            for name, bytes_s in ((FIRST, 1e9), (SECOND, 5e8))
        }
        regions = [Region(int(a.ctypes.data), a.nbytes, HOST) for a in (self.pages, self.word, self.scratch)]
        for engine in self.engines.values():
            engine.register(regions)
        reads: Callable[[], float] = clock or time.monotonic
        bucket = TokenBucket(rate, 1.0, reads())
        self.mover = Mover(list(self.engines.values()), bucket, probe=regions[2] if probes else None, clock=reads)

    def order(
        self, other: End, pages: list[int], *, fence: bool = True, ends: Ends | None = None, **kinds: Any
    ) -> None:
        """Fetch the other's pages to the same places."""
        here, there = int(self.pages.ctypes.data), int(other.pages.ctypes.data)
        runs = [Run(here + p * PAGE, there + p * PAGE, PAGE) for p in pages]
        word = Run(int(self.word.ctypes.data), int(other.word.ctypes.data), 8)
        limits = {"timeout_s": 5.0, "expires_s": math.inf} | kinds
        order = Fetch("r", ends or other.mover.ends, runs, HOST, HOST, word if fence else None, limits["timeout_s"])
        self.mover.fetch(replace(order, expires_s=limits["expires_s"]))

    def ended(self) -> Fetched:
        (ended,) = eventually(self.mover.take_ended)
        return ended

    def fetch(self, other: End, pages: list[int] | None = None, **kinds: Any) -> Fetched:
        self.order(other, pages if pages is not None else [1, 2, 5], **kinds)
        return self.ended()

    def fail(self, name: str, fault: Fault, times: int = 10**9) -> None:
        self.engines[name].fault, self.engines[name].times = fault, times


def eventually(take: Callable[[], list[T]], wait_s: float = 20.0) -> list[T]:
    """What ``take`` yields first."""
    deadline_s = time.monotonic() + wait_s
    while not (found := take()):
        assert time.monotonic() < deadline_s, "nothing came"
        time.sleep(0.001)
    return found


@pytest.fixture
def ends() -> Iterator[tuple[End, End]]:
    here, there = End(), End()
    there.pages[:] = np.arange(1, PAGES + 1, dtype=np.uint8)[:, None]
    there.word[0] = 77
    yield here, there
    here.mover.close()
    there.mover.close()


def tried(fetched: Fetched) -> list[tuple[Rung, str]]:
    return [(attempt.rung, attempt.failure) for attempt in fetched.attempts]


def assert_arrived(here: End) -> None:
    assert list(np.flatnonzero(here.pages[:, 0])) == [1, 2, 5]
    assert list(here.pages[[1, 2, 5], -1]) == [2, 3, 6]
    assert here.word[0] == 77


def test_pages_come_by_the_first_rung_and_then_the_fence(ends: tuple[End, End]) -> None:
    here, there = ends
    fetched = here.fetch(there)
    assert (fetched.failure, tried(fetched)) == ("", [(A, "")])
    assert fetched.attempts[0].bytes_moved == 3 * PAGE
    assert_arrived(here)


@pytest.mark.parametrize("fault", ["connect", "submit", "gone", "completion"])
def test_an_engine_that_fails_at_submit_or_at_completion_is_followed_by_the_next(
    ends: tuple[End, End], fault: Fault
) -> None:
    here, there = ends
    here.fail(FIRST, fault)
    fetched = here.fetch(there)
    assert (fetched.failure, tried(fetched)) == ("", [(A, "peer"), (B, "")])
    assert_arrived(here)


def test_an_engine_that_stalls_is_given_up_before_the_deadline(ends: tuple[End, End]) -> None:
    here, there = ends
    here.fail(FIRST, "stall")
    begun_s = time.monotonic()
    fetched = here.fetch(there, timeout_s=4.0)
    assert tried(fetched) == [(A, "timeout"), (B, "")]
    assert time.monotonic() - begun_s < 3.0
    assert_arrived(here)


def test_a_failed_rung_is_left_alone_and_twice_as_long_when_it_fails_again() -> None:
    clock = Clock()
    here, there = End(clock=clock), End(clock=clock)
    here.fail(FIRST, "completion", times=2)
    here.fetch(there)
    assert tried(here.fetch(there)) == [(B, "")]
    clock.now_s += COOL_DOWN_S
    assert tried(here.fetch(there)) == [(A, "peer"), (B, "")]
    clock.now_s += COOL_DOWN_S
    assert tried(here.fetch(there)) == [(B, "")]
    clock.now_s += COOL_DOWN_S
    assert tried(here.fetch(there)) == [(A, "")]
    here.mover.close()
    there.mover.close()


def test_when_every_pull_fails_the_peer_is_asked_to_push(ends: tuple[End, End]) -> None:
    here, there = ends
    for name in (FIRST, SECOND):
        here.fail(name, "submit", times=1)
    fetched = here.fetch(there, fence=False)
    assert tried(fetched) == [(A, "peer"), (B, "peer"), (A_PUSH, "")]
    assert list(here.pages[[1, 2, 5], -1]) == [2, 3, 6]
    assert there.engines[FIRST].started["push"] == 1


def test_a_push_that_fails_at_the_peer_is_followed_by_the_next_rung(ends: tuple[End, End]) -> None:
    here, there = ends
    for name in (FIRST, SECOND):
        here.fail(name, "submit", times=1)
    there.fail(FIRST, "submit")
    fetched = here.fetch(there, fence=False)
    assert tried(fetched)[2:] == [(A_PUSH, "peer"), (B_PUSH, "")]


def test_a_push_that_stalls_ends_only_when_the_peer_has_stopped_it(ends: tuple[End, End]) -> None:
    here, there = ends
    for name in (FIRST, SECOND):
        here.fail(name, "submit", times=1)
    there.fail(FIRST, "stall")
    fetched = here.fetch(there, fence=False, timeout_s=3.0)
    assert tried(fetched)[2:] == [(A_PUSH, "timeout"), (B_PUSH, "")]


def test_when_nothing_works_the_fetch_fails_with_the_last_reason(ends: tuple[End, End]) -> None:
    here, there = ends
    for name in (FIRST, SECOND):
        here.fail(name, "submit")
        there.fail(name, "submit")
    fetched = here.fetch(there)
    assert fetched.failure == "peer"
    assert [rung for rung, _ in tried(fetched)] == [A, B, A_PUSH, B_PUSH]


def test_the_deadline_bounds_all_attempts_together(ends: tuple[End, End]) -> None:
    here, there = ends
    for name in (FIRST, SECOND):
        here.fail(name, "stall")
        there.fail(name, "stall")
    begun_s = time.monotonic()
    fetched = here.fetch(there, timeout_s=1.0)
    assert fetched.failure == "timeout"
    assert time.monotonic() - begun_s < 5.0


def test_no_attempt_begins_after_the_lease(ends: tuple[End, End]) -> None:
    here, there = ends
    fetched = here.fetch(there, expires_s=time.monotonic() - 1)
    assert (fetched.failure, fetched.attempts) == ("stale", [])
    here.fail(FIRST, "stall")
    fetched = here.fetch(there, timeout_s=4.0, expires_s=time.monotonic() + 0.3)
    assert (fetched.failure, tried(fetched)) == ("stale", [(A, "timeout")])


def test_a_peer_of_another_fingerprint_is_refused_without_a_second_try(ends: tuple[End, End]) -> None:
    here, _ = ends
    stranger = End(fingerprint="g")
    fetched = here.fetch(stranger)
    assert (fetched.failure, tried(fetched)) == ("fingerprint", [(A, "fingerprint")])
    stranger.mover.close()


def test_a_peer_without_a_common_engine_is_a_failure_and_no_crash(ends: tuple[End, End]) -> None:
    here, there = ends
    here.order(there, [1], ends=Ends("other", {"carrier-pigeon": b"x"}))
    assert here.ended().failure == "peer"


def test_the_same_hosts_engine_is_not_even_tried_with_a_peer_on_another_host(ends: tuple[End, End]) -> None:
    here, there = ends
    said = there.mover.ends
    far = said.engines[FIRST].replace(host_identity().encode(), b"x" * len(host_identity()))
    here.order(there, [1, 2, 5], ends=Ends(said.mover, said.engines | {FIRST: far}))
    assert tried(here.ended()) == [(B, "")]
    assert_arrived(here)


def test_messages_reach_the_peer_even_if_the_first_engine_does_not(ends: tuple[End, End]) -> None:
    here, there = ends
    here.mover.notify(there.mover.ends, b"one")
    assert eventually(there.mover.take_notes) == [b"one"]
    here.fail(FIRST, "connect")
    fresh = End()
    here.mover.notify(fresh.mover.ends, b"two")
    assert eventually(fresh.mover.take_notes) == [b"two"]
    fresh.mover.close()


def test_many_fetches_at_once_all_end(ends: tuple[End, End]) -> None:
    here, there = ends
    for page in range(PAGES):
        here.order(there, [page])
    ended: list[Fetched] = []
    while len(ended) < PAGES:
        ended += eventually(here.mover.take_ended)
    assert {fetched.failure for fetched in ended} == {""}
    assert np.array_equal(here.pages, there.pages)
    assert here.mover.under_way == 0


def test_a_fetch_waits_until_the_bucket_allows_it() -> None:
    here, there = End(rate=10 * PAGE), End()
    begun_s = time.monotonic()
    for _ in range(3):
        here.order(there, [1, 2])
    ended: list[Fetched] = []
    while len(ended) < 3:
        ended += eventually(here.mover.take_ended)
    # 4 pages of debt at 10 pages a second before the third may start.
    assert time.monotonic() - begun_s > 0.35
    here.mover.close()
    there.mover.close()


def test_a_pair_is_probed_in_both_directions_and_the_fastest_rung_is_used_from_then_on() -> None:
    clock = Clock()
    here, there = End(probes=True, clock=clock), End(probes=True, clock=clock)
    there.fail(FIRST, "slow")
    here.fail(FIRST, "slow")
    assert tried(here.fetch(there)) == [(A, "")]
    rates = eventually(lambda: [r for r in [here.mover.rates(there.mover.ends)] if len(r) == 4])[0]
    assert rates == pytest.approx({A: 1e8, B: 5e8, A_PUSH: 1e8, B_PUSH: 5e8}, rel=0.01)
    assert tried(here.fetch(there)) == [(B, "")]
    started = [dict(end.engines[FIRST].started) for end in (here, there)]
    time.sleep(0.3)
    assert [dict(end.engines[FIRST].started) for end in (here, there)] == started
    here.mover.close()
    there.mover.close()


def test_when_transfers_become_half_as_fast_the_pair_is_probed_anew(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    here, there = End(probes=True, clock=clock), End(probes=True, clock=clock)
    here.fetch(there)
    eventually(lambda: [1] if len(here.mover.rates(there.mover.ends)) == 4 else [])
    for end in (here, there):
        end.fail(FIRST, "slow")

    def noticed() -> bool:
        here.fetch(there, list(range(PAGES)))
        return "has become slow" in caplog.text

    # Pull and push of the engine take turns, as each falls behind the other.
    assert any(noticed() for _ in range(2 * SLOW_IN_A_ROW))
    # Nothing is fetched any more: what changes was probed.
    eventually(lambda: [1] if here.mover.rates(there.mover.ends)[A_PUSH] == pytest.approx(1e8, rel=0.01) else [])
    here.mover.close()
    there.mover.close()
