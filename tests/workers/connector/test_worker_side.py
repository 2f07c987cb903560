"""The worker side over a mover that copies memory of this process when told to."""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from llmserve.kvstore.transfer.base import Place
from llmserve.kvstore.transfer.ladder import Rung
from llmserve.kvstore.transfer.orders import Attempt, Ends, Fetch, Fetched
from llmserve.kvstore.transfer.pages import Strip
from llmserve.workers.connector.leases import LeaseTable
from llmserve.workers.connector.meta import Pull, Said, StepMeta
from llmserve.workers.connector.wire import Handoff, RankPages, encode
from llmserve.workers.connector.worker import WorkerSide

PAGE = 32
PAGES = 8
PULL, PUSH = Rung("memory", "pull"), Rung("memory", "push")


@dataclass
class MemoryMover:
    """Copies at once, unless ``hold``; ends with ``failure``."""

    hold: bool = False
    failure: str = ""
    notes: list[bytes] = field(default_factory=list)
    sent: list[bytes] = field(default_factory=list)
    fetches: list[Fetch] = field(default_factory=list)
    ended: list[Fetched] = field(default_factory=list)
    loads: list[Fetch] = field(default_factory=list)
    loadable: bool = True
    rung: Rung = PULL

    def load(self, fetch: Fetch) -> bool:
        if self.loadable:
            self.loads.append(fetch)
        return self.loadable

    def finish_loads(self) -> list[Fetched]:
        before, self.ended = self.ended, []
        while self.loads:
            self.end(self.loads.pop())
        loaded, self.ended = self.ended, before
        return loaded

    def fetch(self, fetch: Fetch) -> None:
        self.fetches.append(fetch)
        if not self.hold:
            self.end(fetch)

    def end(self, fetch: Fetch) -> None:
        size_bytes = sum(run.size_bytes for run in fetch.runs)
        if self.failure:
            self.ended.append(Fetched(fetch.id, self.failure, [Attempt(PULL, 0, 0.1, self.failure)]))
            return
        assert fetch.fence is not None
        for run in [*fetch.runs, fetch.fence]:
            ctypes.memmove(run.local, run.remote, run.size_bytes)
        self.ended.append(Fetched(fetch.id, "", [Attempt(PUSH, 0, 0.1, "peer"), Attempt(self.rung, size_bytes, 0.1)]))

    def notify(self, ends: Ends, message: bytes) -> None:
        self.sent.append(message)

    def take_ended(self) -> list[Fetched]:
        ended, self.ended = self.ended, []
        return ended

    def take_notes(self) -> list[bytes]:
        notes, self.notes = self.notes, []
        return notes

    def close(self) -> None: ...


class Bench:
    """A consumer under test, and the memory of a producer."""

    def __init__(self) -> None:
        self.mover = MemoryMover()
        self.here = np.zeros((PAGES, PAGE), dtype=np.uint8)
        self.there = np.arange(PAGES, dtype=np.uint8)[:, None].repeat(PAGE, 1) + 1
        self.there_table = LeaseTable(4)
        self.table = LeaseTable(4)
        self.fence = WorkerSide.fence_table()
        self.side = WorkerSide(
            self.mover,
            strips=[[self.strip(self.here)]],
            place=Place(),
            table=self.table,
            fence=self.fence,
            rank="0/0",
            timeout_s=60.0,
            mark=lambda: "mark",
        )

    @staticmethod
    def strip(data: np.ndarray) -> Strip:
        return Strip(int(data.ctypes.data), PAGE, PAGE)

    def pull(self, pages: dict[int, int], *, token: int = 9, lease_s: float = 60.0, age_s: float = 0.0) -> Pull:
        strip = self.strip(self.there)
        ends = Ends("p1", {"memory": b"p"})
        rank = RankPages(ends, None, [[(strip.base, strip.stride_bytes, PAGE)]], self.there_table.address)
        handoff = Handoff(
            engine_id="p1",
            fingerprint="f",
            request="their",
            slot=1,
            token=token,
            tokens=1,
            lease_s=lease_s,
            tp=1,
            pp=1,
            pages=[list(pages.values())],
            ranks={"0/0": encode(rank)},
        )
        return Pull(handoff, [list(pages)], [list(pages.values())], time.monotonic() - age_s)

    def failures(self) -> list[str]:
        stats = self.side.take_stats()
        return [transfer[4] for transfer in stats.data["transfers"]] if stats else []


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_pages_are_read_checked_and_the_producer_is_told(bench: Bench) -> None:
    bench.there_table.arm(1, 9)
    bench.side.begin(StepMeta(pull={"mine": bench.pull({5: 2, 6: 3})}))
    results = bench.side.advance()
    assert (results.received, results.failed) == ({"mine"}, set())
    assert list(bench.here[:, 0]) == [0, 0, 0, 0, 0, 3, 4, 0]
    assert bench.mover.sent == [b"done:their"]
    stats = bench.side.take_stats()
    assert stats is not None
    assert stats.data["transfers"] == [
        ["memory", "push", 0, 0.1, "peer", "mine"],
        ["memory", "pull", 2 * PAGE, 0.1, "", "mine"],
    ]


@pytest.mark.parametrize("found", [0, 10])
def test_pages_whose_lease_is_over_or_another_are_reported_failed(bench: Bench, found: int) -> None:
    bench.there_table.arm(1, found)
    bench.side.begin(StepMeta(pull={"mine": bench.pull({5: 2})}))
    results = bench.side.advance()
    assert results.failed == {"mine"} == results.received
    assert bench.failures() == ["peer", "stale"]
    assert bench.mover.sent == []


def test_a_token_of_an_earlier_read_does_not_pass_for_this_ones(bench: Bench) -> None:
    bench.there_table.arm(1, 9)
    for _ in range(1100):
        bench.side.begin(StepMeta(pull={"mine": bench.pull({5: 2})}))
        assert bench.side.advance().failed == set()
    bench.mover.hold = True
    bench.side.begin(StepMeta(pull={"mine": bench.pull({5: 2})}))
    fetch = bench.mover.fetches[-1]
    assert fetch.fence is not None
    assert ctypes.c_uint64.from_address(fetch.fence.local).value == 0


@pytest.mark.parametrize("kind", ["timeout", "peer", "fingerprint", "stale"])
def test_a_fetch_that_failed_is_a_failed_read(bench: Bench, kind: str) -> None:
    bench.mover.failure = kind
    bench.side.begin(StepMeta(pull={"mine": bench.pull({5: 2})}))
    results = bench.side.advance()
    assert results.failed == {"mine"} == results.received
    assert bench.failures() == [kind]
    assert bench.side.advance().received == set()


def test_a_fetch_carries_its_deadline_the_end_of_its_lease_and_what_the_device_still_does(bench: Bench) -> None:
    bench.side.begin(StepMeta(pull={"mine": bench.pull({5: 2}, lease_s=5.0, age_s=2.0)}))
    (fetch,) = bench.mover.fetches
    assert (fetch.timeout_s, fetch.after) == (60.0, "mark")
    assert 2.0 < fetch.expires_s - time.monotonic() <= 2.5


def test_a_read_under_way_is_not_only_waiting(bench: Bench) -> None:
    bench.mover.hold = True
    bench.side.begin(StepMeta(arm=[(3, 55)], hold={"held": (3, 60.0)}))
    assert bench.side.only_waits
    bench.side.begin(StepMeta(pull={"mine": bench.pull({5: 2})}))
    assert not bench.side.only_waits
    assert bench.side.advance().received == set()
    bench.mover.end(bench.mover.fetches[0])
    assert bench.side.advance().received == {"mine"}


def test_a_pull_that_the_scheduler_refused_is_reported_failed(bench: Bench) -> None:
    pull = bench.pull({5: 2})
    refused = Pull(pull.handoff, pull.local, pull.remote, pull.arrived_s, "why")
    bench.side.begin(StepMeta(pull={"mine": refused}))
    assert bench.side.advance().failed == {"mine"}
    assert bench.failures() == ["other"]


def test_a_dismissed_handoff_is_told_to_the_producer(bench: Bench) -> None:
    bench.side.begin(StepMeta(dismiss=[bench.pull({}).handoff]))
    assert bench.mover.sent == [b"done:their"]
    assert bench.side.advance().received == set()


def test_a_notification_of_a_consumer_ends_the_lease(bench: Bench) -> None:
    bench.side.begin(StepMeta(arm=[(3, 55)], hold={"held": (3, 60.0)}))
    assert bench.table.value(3) == 55
    bench.mover.notes = [b"nonsense", b"done:held", b"done:held", b"done:unknown"]
    assert bench.side.advance().sent == {"held"}
    assert bench.table.value(3) == 0
    assert bench.side.advance().sent == set()


def test_a_lease_that_nobody_reads_ends_by_itself(bench: Bench) -> None:
    bench.side.begin(StepMeta(arm=[(3, 55)], hold={"held": (3, 0.0)}))
    assert bench.side.advance().sent == {"held"}


def test_a_release_ends_the_lease_even_in_the_step_that_begins_it(bench: Bench) -> None:
    bench.side.begin(StepMeta(arm=[(3, 55)], hold={"held": (3, 60.0)}, release=["held"]))
    assert bench.side.advance().sent == {"held"}


def test_a_slot_cleared_and_armed_again_in_one_step_is_armed(bench: Bench) -> None:
    bench.side.begin(StepMeta(arm=[(3, 55)]))
    bench.side.begin(StepMeta(disarm=[3], arm=[(3, 56)]))
    assert bench.table.value(3) == 56


def load(bench: Bench, *, refusal: str = "") -> Said | None:
    pull = replace(bench.pull({5: 2}), at_once=True, refusal=refusal)
    bench.side.begin(StepMeta(pull={"mine": pull}))
    results = bench.side.advance()
    assert (results.received, results.failed) == (set(), set()), "vLLM does not wait for it"
    return bench.side.take_said({})


def test_pages_loaded_at_once_are_checked_with_the_output_of_the_step(bench: Bench) -> None:
    bench.there_table.arm(1, 9)
    assert load(bench) == Said(loaded={"mine": True})
    assert list(bench.here[:, 0]) == [0, 0, 0, 0, 0, 3, 0, 0]
    assert bench.mover.sent == [b"done:their"]
    assert bench.side.take_said({}) is None


def test_a_load_whose_lease_was_over_meanwhile_is_not_good(bench: Bench) -> None:
    assert load(bench) == Said(loaded={"mine": False})
    assert bench.failures() == ["peer", "stale"]
    assert bench.mover.sent == []


@pytest.mark.parametrize(("loadable", "refusal"), [(False, ""), (True, "why")])
def test_a_load_that_cannot_begin_is_not_good(bench: Bench, loadable: bool, refusal: str) -> None:
    bench.mover.loadable = loadable
    for _ in range(1100):
        assert load(bench, refusal=refusal) == Said(loaded={"mine": False})
    assert set(bench.failures()) == {"other"}


def test_a_producer_whose_pages_came_within_the_host_is_near(bench: Bench) -> None:
    bench.there_table.arm(1, 9)
    bench.mover.rung = Rung("same_host", "pull")
    bench.side.begin(StepMeta(pull={"mine": bench.pull({5: 2})}))
    bench.side.advance()
    assert bench.side.take_said({}) == Said(near={("p1", "0/0")})
