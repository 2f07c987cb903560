"""What every transfer engine does, whatever carries the bytes: real memory, real transports.

In the host's memory, and where there are GPUs in theirs: there the ends are two processes, since none maps its own
GPU memory, on two GPUs if there are two.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmserve.kvstore.transfer import link, unavailable
from llmserve.kvstore.transfer.base import (
    FingerprintMismatch,
    Handle,
    PeerGone,
    Place,
    Progress,
    Region,
    Run,
    TransferError,
)
from tests.kvstore.ends import ENGINES, HOST, End, Far, Remote, runs_of, wait_for
from tests.kvstore.memory import FOREIGN, Bytes

PAGE = 98304
"""As of the small model on a CPU."""
PAGES = 128
GPUS = len(list(Path("/dev").glob("nvidia[0-9]*")))


@dataclass(frozen=True)
class Case:
    """An engine, and where the pages of both ends lie."""

    name: str
    here: Place = HOST
    there: Place = HOST

    def __str__(self) -> str:
        return self.name if self.on_host else f"{self.name}-gpu"

    @property
    def on_host(self) -> bool:
        return self.here == HOST

    @property
    def large_bytes(self) -> int:
        """Of which some are under way when a process dies that is killed at once."""
        return (192 << 20) if self.on_host else (2 << 30)

    def end(self, size_bytes: int = PAGE * PAGES, fingerprint: str = "f") -> End:
        return End(self.name, size_bytes, fingerprint, self.here)

    def far(self) -> Far:
        if self.on_host:
            return End(self.name, PAGE * PAGES)
        return Remote(self.name, PAGE * PAGES, place=self.there)

    @property
    def reason(self) -> str | None:
        """Why it cannot be had here."""
        if reason := unavailable(self.name, gpu=not self.on_host):
            return reason
        return "two ends on one GPU" if self.name == "nccl" and not self.on_host and GPUS < 2 else None


CASES = [Case(name) for name in ENGINES]
if GPUS:
    CASES += [Case(name, Place(0), Place(min(1, GPUS - 1))) for name in ENGINES]


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    case = request.param
    assert isinstance(case, Case)
    if reason := case.reason:
        pytest.skip(f"{case}: {reason}")
    return case


class Pair:
    """Two ends, connected."""

    def __init__(self, case: Case) -> None:
        self.here, self.there = case.end(), case.far()
        self.peer = self.here.engine.connect(self.there.description)

    def fill(self) -> Bytes:
        """Zeros here; there the bytes that are returned."""
        theirs = np.random.default_rng(7).integers(1, 255, PAGE * PAGES, dtype=np.uint8)
        self.here.write(0)
        self.there.write(theirs)
        return theirs

    def runs(self, pairs: list[tuple[int, int]]) -> list[Run]:
        return runs_of(pairs, self.here.address, self.there.address, PAGE)

    def start_pull(self, runs: list[Run]) -> Handle:
        return self.here.engine.pull(self.peer, runs, self.here.place, self.there.place)

    def start_push(self, runs: list[Run]) -> Handle:
        return self.here.engine.push(self.peer, runs, self.here.place, self.there.place)

    def end_of(self, handle: Handle) -> Progress:
        return self.here.finish(handle, *self.there.driven)

    def pull(self, runs: list[Run]) -> Progress:
        handle = self.start_pull(runs)
        assert handle.bytes_moved == sum(run.size_bytes for run in runs)
        return self.released(handle)

    def push(self, runs: list[Run]) -> Progress:
        return self.released(self.start_push(runs))

    def released(self, handle: Handle) -> Progress:
        state = self.end_of(handle)
        assert self.here.engine.release(handle)
        return state

    def close(self) -> None:
        self.here.close()
        self.there.close()


@pytest.fixture(scope="module")
def pair(case: Case) -> Iterator[Pair]:
    pair = Pair(case)
    yield pair
    pair.close()


@pytest.fixture
def victim(case: Case) -> Iterator[Remote]:
    victim = Remote(case.name, case.large_bytes, 9, case.there)
    yield victim
    victim.process.send_signal(signal.SIGCONT)
    victim.kill()


@pytest.fixture
def alone(case: Case) -> Iterator[End]:
    end = case.end(case.large_bytes)
    yield end
    end.close()


def test_a_pull_copies_exactly_the_runs(pair: Pair) -> None:
    pair.here.write(1)
    pair.there.write(2)
    runs = [
        Run(pair.here.address + 100, pair.there.address + 50, 10),
        Run(pair.here.address + 300, pair.there.address, 7),
    ]
    assert pair.pull(runs) is Progress.DONE
    assert set(np.flatnonzero(pair.here.read() == 2)) == {*range(100, 110), *range(300, 307)}


def test_a_push_writes_exactly_the_runs(pair: Pair) -> None:
    pair.here.write(3)
    pair.there.write(4)
    assert pair.push([Run(pair.here.address, pair.there.address + 9, 5)]) is Progress.DONE
    assert set(np.flatnonzero(pair.there.read() == 3)) == set(range(9, 14))


page_lists = st.lists(st.integers(0, PAGES - 1), min_size=1, max_size=PAGES, unique=True)


def pages(data: Bytes) -> Bytes:
    return data.reshape(-1, PAGE)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(local=page_lists, remote=page_lists, push=st.booleans())
def test_any_lists_of_pages_arrive_byte_by_byte(pair: Pair, local: list[int], remote: list[int], push: bool) -> None:
    theirs, ours = pair.fill(), np.zeros(PAGE * PAGES, dtype=np.uint8)
    pairs = list(zip(local, remote, strict=False))
    assert (pair.push if push else pair.pull)(pair.runs(pairs)) is Progress.DONE
    source, expected = (ours, theirs.copy()) if push else (theirs, ours.copy())
    for here, there in pairs:
        pages(expected)[there if push else here] = pages(source)[here if push else there]
    assert np.array_equal(pair.there.read(), expected if push else theirs)
    assert np.array_equal(pair.here.read(), ours if push else expected)


def test_many_in_flight_at_once_do_not_mix(pair: Pair) -> None:
    theirs = pair.fill()
    order = random.Random(3).sample(range(PAGES), PAGES)
    groups = [order[at : at + 8] for at in range(0, PAGES, 8)]
    handles = [pair.start_pull(pair.runs([(p, p) for p in group])) for group in groups]
    assert all(pair.end_of(handle) is Progress.DONE for handle in handles)
    assert all(pair.here.engine.release(handle) for handle in handles)
    assert np.array_equal(pair.here.read(), theirs)


def test_both_directions_at_once(pair: Pair) -> None:
    theirs = pair.fill()
    half = PAGES // 2
    pair.here.write(np.full(half * PAGE, 77, dtype=np.uint8), half * PAGE)
    pull = pair.start_pull(pair.runs([(p, p) for p in range(half)]))
    push = pair.start_push(pair.runs([(p, p) for p in range(half, PAGES)]))
    assert pair.released(pull) is Progress.DONE
    assert pair.released(push) is Progress.DONE
    assert np.array_equal(pages(pair.here.read())[:half], pages(theirs)[:half])
    assert (pages(pair.there.read())[half:] == 77).all()


def test_notifications_arrive_in_order(pair: Pair) -> None:
    sent = [b"n%d" % number for number in range(5)]
    for message in sent:
        pair.here.engine.notify(pair.peer, message)
    received: list[bytes] = []

    def all_heard() -> bool:
        received.extend(pair.there.heard())
        return len(received) >= len(sent)

    assert wait_for(all_heard, pair.here.engine)
    assert received == sent


def test_memory_that_is_not_registered_is_not_given(pair: Pair) -> None:
    pair.here.write(0)
    run = Run(pair.here.address, pair.there.address + PAGE * PAGES, PAGE)
    try:
        state = pair.pull([run])
    except TransferError:
        state = Progress.FAILED
    assert state is Progress.FAILED
    assert FOREIGN not in pair.here.read()


def test_a_forgotten_peer_cannot_be_read_and_can_be_connected_again(case: Case) -> None:
    pair = Pair(case)
    pair.fill()
    pair.here.engine.forget(pair.peer)
    with pytest.raises(TransferError):
        pair.start_pull(pair.runs([(0, 0)]))
    pair.here.engine.forget("unknown")
    pair.peer = pair.here.engine.connect(pair.there.description)
    assert pair.pull(pair.runs([(0, 1)])) is Progress.DONE
    pair.close()


def test_a_description_that_is_none_or_of_another_engine_is_refused(pair: Pair, case: Case) -> None:
    with pytest.raises(TransferError):
        pair.here.engine.connect(b"nonsense")
    other = End("ucx" if case.name != "ucx" else "same_host", 64)
    with pytest.raises(TransferError, match="the peer is"):
        pair.here.engine.connect(other.description)
    other.close()


def test_memory_of_another_fingerprint_is_refused(pair: Pair, case: Case) -> None:
    other = case.end(64, fingerprint="g")
    with pytest.raises(FingerprintMismatch, match="'g', this end 'f'"):
        pair.here.engine.connect(other.description)
    other.close()


def test_a_cancelled_transfer_ends_soon_and_the_pair_still_works(pair: Pair) -> None:
    theirs = pair.fill()
    engine = pair.here.engine
    handles = [pair.start_pull(pair.runs([(p, p) for p in range(PAGES)])) for _ in range(3)]
    assert wait_for(lambda: min(map(engine.release, handles)), *pair.there.driven)
    pair.here.write(0)
    wait_for(lambda: False, engine, *pair.there.driven, wait_s=0.3)
    assert not pair.here.read().any()
    assert pair.pull(pair.runs([(3, 4)])) is Progress.DONE
    assert np.array_equal(pages(pair.here.read())[3], pages(theirs)[4])


def test_a_peer_is_not_blamed_for_the_time_in_which_nobody_looked(
    pair: Pair, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "_DRAIN_S", 0.3)
    theirs = pair.fill()
    handle = pair.start_pull(pair.runs([(p, p) for p in range(PAGES)]))
    pair.here.engine.release(handle)
    time.sleep(0.6)
    assert pair.pull(pair.runs([(5, 6)])) is Progress.DONE
    assert np.array_equal(pages(pair.here.read())[5], pages(theirs)[6])


class Killing:
    """Pulls from a process that is about to die or to stop."""

    def __init__(self, alone: End, victim: Remote) -> None:
        self.alone, self.victim = alone, victim
        self.peer = alone.engine.connect(victim.description)
        assert alone.finish(self.pull(PAGE), alone.engine) is Progress.DONE
        first = alone.read()
        assert (first[:PAGE] == 9).all()

    def pull(self, size_bytes: int) -> Handle:
        run = Run(self.alone.address, self.victim.address, size_bytes)
        return self.alone.engine.pull(self.peer, [run], self.alone.place, self.victim.place)


def test_a_peer_killed_before_a_transfer_is_gone(alone: End, victim: Remote) -> None:
    killing = Killing(alone, victim)
    victim.process.kill()
    victim.process.wait()
    wait_for(lambda: False, alone.engine, wait_s=0.1)
    try:
        state = alone.finish(killing.pull(PAGE), alone.engine)
    except PeerGone:
        state = Progress.FAILED
    assert state is Progress.FAILED
    alone.engine.forget(killing.peer)
    with pytest.raises(TransferError):
        killing.pull(PAGE)


def test_a_peer_killed_in_the_middle_fails_its_transfers(alone: End, victim: Remote, case: Case) -> None:
    killing = Killing(alone, victim)
    # Enough of them that some are under way when the peer dies.
    handles = [killing.pull(case.large_bytes) for _ in range(4)]
    victim.process.kill()
    states = [alone.finish(handle, alone.engine) for handle in handles]
    assert Progress.RUNNING not in states
    at_once = case.name == "nixl" or (case.name == "same_host" and not case.on_host)
    if not at_once:  # NIXL's reads of a process of the same host, and a GPU's copies, end before it is dead
        assert states[-1] is Progress.FAILED
    assert all(alone.engine.release(handle) for handle in handles)


def test_a_transfer_from_a_stopped_peer_can_be_cancelled(alone: End, victim: Remote) -> None:
    killing = Killing(alone, victim)
    victim.process.send_signal(signal.SIGSTOP)
    handle = killing.pull(64 * PAGE)
    alone.finish(handle, alone.engine, wait_s=0.5)
    assert wait_for(lambda: alone.engine.release(handle), alone.engine)


def test_a_closed_engine_leaves_its_peers_with_an_error(case: Case) -> None:
    pair = Pair(case)
    assert pair.pull(pair.runs([(0, 0)])) is Progress.DONE
    pair.there.close()
    if case.name in ("ucx", "nccl"):
        wait_for(lambda: False, pair.here.engine, wait_s=0.1)
        with pytest.raises(TransferError):
            pair.start_pull(pair.runs([(0, 0)]))
    pair.here.close()


@pytest.mark.parametrize("name", ENGINES)
def test_gpu_memory_is_refused_by_an_engine_for_host_memory(name: str) -> None:
    if name == "nixl":
        pytest.skip("NIXL refuses it in its own words")
    if reason := unavailable(name):
        pytest.skip(f"{name}: {reason}")
    end = End(name, 64)
    with pytest.raises(TransferError, match="host memory"):
        end.engine.register([Region(end.address, 8, Place(0))])
    end.close()
