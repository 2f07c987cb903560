"""The worker side over a transfer engine that copies memory of this process when told to."""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from llmserve.kvstore.transfer.base import Handle, PeerGone, Place, Progress, Region, Run, TransferEngine
from llmserve.kvstore.transfer.pacing import TokenBucket
from llmserve.kvstore.transfer.pages import Strip
from llmserve.workers.connector.leases import LeaseTable
from llmserve.workers.connector.meta import Pull, StepMeta
from llmserve.workers.connector.wire import Handoff, RankPages, encode
from llmserve.workers.connector.worker import WorkerSide

PAGE = 32
PAGES = 8


@dataclass
class Copy(Handle):
    runs: list[Run]
    bytes_moved: int
    state: Progress = Progress.RUNNING
    cancellable: bool = True


@dataclass
class MemoryEngine(TransferEngine):
    """Copies at once, or when ``hold`` is lifted."""

    name: str = "memory"
    hold: bool = False
    gone: bool = False
    cancellable: bool = True
    inbox: list[bytes] = field(default_factory=list)
    sent: list[bytes] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)

    def register(self, regions: Sequence[Region]) -> None: ...

    def describe(self) -> bytes:
        return b"me"

    def connect(self, description: bytes) -> str:
        return description.decode()

    def forget(self, peer: str) -> None: ...

    def pull(self, peer: str, runs: Sequence[Run], local: Place, remote: Place) -> Handle:
        if self.gone:
            raise PeerGone("the peer is gone")
        copy = Copy(list(runs), sum(run.size_bytes for run in runs), cancellable=self.cancellable)
        self.copies.append(copy)
        if not self.hold:
            self.land(copy)
        return copy

    def push(self, peer: str, runs: Sequence[Run], local: Place, remote: Place) -> Handle:
        raise NotImplementedError

    def land(self, copy: Copy) -> None:
        for run in copy.runs:
            ctypes.memmove(run.local, run.remote, run.size_bytes)
        copy.state = Progress.DONE

    def poll(self, handle: Handle) -> Progress:
        assert isinstance(handle, Copy)
        return handle.state

    def release(self, handle: Handle) -> bool:
        assert isinstance(handle, Copy)
        return handle.cancellable or handle.state is Progress.DONE

    def notify(self, peer: str, message: bytes) -> None:
        self.sent.append(message)

    def notifications(self) -> list[bytes]:
        received, self.inbox = self.inbox, []
        return received

    def close(self) -> None: ...


class Bench:
    """A consumer under test, and the memory of a producer."""

    def __init__(self, *, timeout_s: float = 60.0, rate: float = math.inf) -> None:
        self.engine = MemoryEngine()
        self.here = np.zeros((PAGES, PAGE), dtype=np.uint8)
        self.there = np.arange(PAGES, dtype=np.uint8)[:, None].repeat(PAGE, 1) + 1
        self.there_table = LeaseTable(4)
        self.table = LeaseTable(4)
        self.fence = WorkerSide.fence_table()
        self.side = WorkerSide(
            self.engine,
            strips=[[self.strip(self.here)]],
            place=Place(),
            table=self.table,
            fence=self.fence,
            rank="0/0",
            timeout_s=timeout_s,
            bucket=TokenBucket(rate, 1.0, time.monotonic()),
        )

    @staticmethod
    def strip(data: np.ndarray) -> Strip:
        return Strip(int(data.ctypes.data), PAGE, PAGE)

    def pull(self, pages: dict[int, int], *, token: int = 9, lease_s: float = 60.0, age_s: float = 0.0) -> Pull:
        strip = self.strip(self.there)
        rank = RankPages("memory", b"p", None, [[(strip.base, strip.stride_bytes, PAGE)]], self.there_table.address)
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
    assert bench.engine.sent == [b"done:their"]
    stats = bench.side.take_stats()
    assert stats is not None
    assert stats.data["transfers"][0][:3] == ["memory", "pull", 2 * PAGE]


@pytest.mark.parametrize("found", [0, 10])
def test_pages_whose_lease_is_over_or_another_are_reported_failed(bench: Bench, found: int) -> None:
    bench.there_table.arm(1, found)
    bench.side.begin(StepMeta(pull={"mine": bench.pull({5: 2})}))
    results = bench.side.advance()
    assert results.failed == {"mine"} == results.received
    assert bench.failures() == ["stale"]
    assert bench.engine.sent == []


def test_the_fence_is_read_only_after_the_pages(bench: Bench) -> None:
    bench.there_table.arm(1, 9)
    bench.engine.hold = True
    bench.side.begin(StepMeta(pull={"mine": bench.pull({5: 2})}))
    bench.side.advance()
    assert len(bench.engine.copies) == 1
    bench.there_table.clear(1)  # the lease ends while the pages are on their way
    bench.engine.land(bench.engine.copies[0])
    bench.engine.hold = False
    assert bench.side.advance().failed == {"mine"}


def test_a_read_past_its_deadline_is_cancelled_and_reported_failed() -> None:
    bench = Bench(timeout_s=0.0)
    bench.engine.hold = True
    bench.side.begin(StepMeta(pull={"mine": bench.pull({5: 2})}))
    assert bench.side.advance().failed == {"mine"}
    assert bench.failures() == ["timeout"]


def test_a_read_that_cannot_be_cancelled_is_not_reported_before_it_is_off() -> None:
    bench = Bench(timeout_s=0.0)
    bench.engine.hold, bench.engine.cancellable = True, False
    bench.side.begin(StepMeta(pull={"mine": bench.pull({5: 2})}))
    assert bench.side.advance().received == set()
    bench.engine.land(bench.engine.copies[0])
    assert bench.side.advance().failed == {"mine"}
    assert bench.side.advance().received == set()


def test_a_peer_that_is_gone_is_a_failed_read(bench: Bench) -> None:
    bench.engine.gone = True
    bench.side.begin(StepMeta(pull={"mine": bench.pull({5: 2})}))
    assert bench.side.advance().failed == {"mine"}
    assert bench.failures() == ["peer"]


def test_a_read_close_to_the_end_of_the_lease_is_not_begun(bench: Bench) -> None:
    bench.there_table.arm(1, 9)
    bench.side.begin(StepMeta(pull={"mine": bench.pull({5: 2}, lease_s=5.0, age_s=4.6)}))
    assert bench.side.advance().failed == {"mine"}
    assert bench.engine.copies == []
    assert bench.failures() == ["stale"]


def test_a_pull_that_the_scheduler_refused_is_reported_failed(bench: Bench) -> None:
    pull = bench.pull({5: 2})
    refused = Pull(pull.handoff, pull.local, pull.remote, pull.arrived_s, "why")
    bench.side.begin(StepMeta(pull={"mine": refused}))
    assert bench.side.advance().failed == {"mine"}
    assert bench.failures() == ["other"]


def test_transfers_start_only_as_the_bucket_permits() -> None:
    bench = Bench(rate=0.001)
    bench.there_table.arm(1, 9)
    bench.side.begin(StepMeta(pull={"a": bench.pull({5: 2}), "b": bench.pull({6: 2})}))
    assert bench.side.advance().received == {"a"}
    assert bench.side.advance().received == set()


def test_a_dismissed_handoff_is_told_to_the_producer(bench: Bench) -> None:
    bench.side.begin(StepMeta(dismiss=[bench.pull({}).handoff]))
    assert bench.engine.sent == [b"done:their"]
    assert bench.side.advance().received == set()


def test_a_notification_of_a_consumer_ends_the_lease(bench: Bench) -> None:
    bench.side.begin(StepMeta(arm=[(3, 55)], hold={"held": (3, 60.0)}))
    assert bench.table.value(3) == 55
    bench.engine.inbox = [b"nonsense", b"done:held", b"done:held", b"done:unknown"]
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
