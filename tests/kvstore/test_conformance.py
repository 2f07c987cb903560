"""What every transfer engine does, whatever carries the bytes: real memory, real transports."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmserve.kvstore.transfer import unavailable
from llmserve.kvstore.transfer.base import FingerprintMismatch, PeerGone, Progress, Region, Run, TransferError
from tests.kvstore.ends import ENGINES, HOST, WAIT_S, End, Victim, runs_of, wait_for

PAGE = 98304
"""As of the small model on a CPU."""
PAGES = 128
LARGE = 192 << 20


@pytest.fixture(scope="module", params=ENGINES)
def name(request: pytest.FixtureRequest) -> str:
    if reason := unavailable(request.param):
        pytest.skip(f"{request.param}: {reason}")
    return str(request.param)


class Pair:
    """Two ends in this process, connected."""

    def __init__(self, name: str) -> None:
        self.here, self.there = End(name, PAGE * PAGES), End(name, PAGE * PAGES)
        self.peer = self.here.engine.connect(self.there.engine.describe())

    def fill(self) -> None:
        self.here.data[:] = 0
        self.there.data[:] = np.random.default_rng(7).integers(1, 255, self.there.data.size, dtype=np.uint8)

    def runs(self, pairs: list[tuple[int, int]], page_bytes: int = PAGE) -> list[Run]:
        return runs_of(pairs, self.here.address, self.there.address, page_bytes)

    def pull(self, runs: list[Run]) -> Progress:
        handle = self.here.engine.pull(self.peer, runs, HOST, HOST)
        assert handle.bytes_moved == sum(run.size_bytes for run in runs)
        state = self.here.finish(handle, self.there.engine)
        assert self.here.engine.release(handle)
        return state

    def push(self, runs: list[Run]) -> Progress:
        handle = self.here.engine.push(self.peer, runs, HOST, HOST)
        state = self.here.finish(handle, self.there.engine)
        assert self.here.engine.release(handle)
        return state


@pytest.fixture(scope="module")
def pair(name: str) -> Iterator[Pair]:
    pair = Pair(name)
    yield pair
    pair.here.engine.close()
    pair.there.engine.close()


@pytest.fixture
def victim(name: str) -> Iterator[Victim]:
    victim = Victim(name, LARGE, 9)
    yield victim
    victim.process.send_signal(signal.SIGCONT)
    victim.kill()


@pytest.fixture
def alone(name: str) -> Iterator[End]:
    end = End(name, LARGE)
    yield end
    end.engine.close()


def test_a_pull_copies_exactly_the_runs(pair: Pair) -> None:
    pair.here.data[:], pair.there.data[:] = 1, 2
    runs = [
        Run(pair.here.address + 100, pair.there.address + 50, 10),
        Run(pair.here.address + 300, pair.there.address, 7),
    ]
    assert pair.pull(runs) is Progress.DONE
    assert set(np.flatnonzero(pair.here.data == 2)) == {*range(100, 110), *range(300, 307)}


def test_a_push_writes_exactly_the_runs(pair: Pair) -> None:
    pair.here.data[:], pair.there.data[:] = 3, 4
    assert pair.push([Run(pair.here.address, pair.there.address + 9, 5)]) is Progress.DONE
    assert set(np.flatnonzero(pair.there.data == 3)) == set(range(9, 14))


page_lists = st.lists(st.integers(0, PAGES - 1), min_size=1, max_size=PAGES, unique=True)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(local=page_lists, remote=page_lists, push=st.booleans())
def test_any_lists_of_pages_arrive_byte_by_byte(pair: Pair, local: list[int], remote: list[int], push: bool) -> None:
    pair.fill()
    pairs = list(zip(local, remote, strict=False))
    before_here, before_there = pair.here.pages(PAGE).copy(), pair.there.pages(PAGE).copy()
    assert (pair.push if push else pair.pull)(pair.runs(pairs)) is Progress.DONE
    here, there = pair.here.pages(PAGE), pair.there.pages(PAGE)
    source, target, start = (before_here, there, before_there) if push else (before_there, here, before_here)
    expected = start.copy()
    for mine, theirs in pairs:
        expected[theirs if push else mine] = source[mine if push else theirs]
    assert np.array_equal(target, expected)
    assert np.array_equal(here if push else there, before_here if push else before_there)


def test_many_in_flight_at_once_do_not_mix(pair: Pair) -> None:
    pair.fill()
    order = random.Random(3).sample(range(PAGES), PAGES)
    groups = [order[at : at + 8] for at in range(0, PAGES, 8)]
    engine = pair.here.engine
    handles = [engine.pull(pair.peer, pair.runs([(p, p) for p in group]), HOST, HOST) for group in groups]
    assert all(pair.here.finish(handle, pair.there.engine) is Progress.DONE for handle in handles)
    assert all(engine.release(handle) for handle in handles)
    assert np.array_equal(pair.here.data, pair.there.data)


def test_both_directions_at_once(pair: Pair) -> None:
    pair.fill()
    half = PAGES // 2
    pair.here.pages(PAGE)[half:] = 77
    expected = pair.there.pages(PAGE)[:half].copy()
    engine = pair.here.engine
    pull = engine.pull(pair.peer, pair.runs([(p, p) for p in range(half)]), HOST, HOST)
    push = engine.push(pair.peer, pair.runs([(p, p) for p in range(half, PAGES)]), HOST, HOST)
    assert pair.here.finish(pull, pair.there.engine) is Progress.DONE
    assert pair.here.finish(push, pair.there.engine) is Progress.DONE
    assert engine.release(pull)
    assert engine.release(push)
    assert np.array_equal(pair.here.pages(PAGE)[:half], expected)
    assert (pair.there.pages(PAGE)[half:] == 77).all()


def test_notifications_arrive_in_order(pair: Pair) -> None:
    for number in range(5):
        pair.here.engine.notify(pair.peer, b"n%d" % number)
    received: list[bytes] = []
    deadline_s = time.monotonic() + WAIT_S
    while len(received) < 5 and time.monotonic() < deadline_s:
        received += pair.there.engine.notifications()
        pair.here.engine.notifications()
    assert received == [b"n%d" % number for number in range(5)]


def test_memory_that_is_not_registered_is_not_given(pair: Pair) -> None:
    foreign = np.ones(PAGE, dtype=np.uint8)
    pair.here.data[:] = 0
    run = Run(pair.here.address, int(foreign.ctypes.data), PAGE)
    try:
        state = pair.pull([run])
    except TransferError:
        state = Progress.FAILED
    assert state is Progress.FAILED
    assert not pair.here.data.any()


def test_a_forgotten_peer_cannot_be_read_and_can_be_connected_again(name: str) -> None:
    pair = Pair(name)
    pair.fill()
    pair.here.engine.forget(pair.peer)
    with pytest.raises(TransferError):
        pair.here.engine.pull(pair.peer, pair.runs([(0, 0)]), HOST, HOST)
    pair.here.engine.forget("unknown")
    pair.peer = pair.here.engine.connect(pair.there.engine.describe())
    assert pair.pull(pair.runs([(0, 1)])) is Progress.DONE
    pair.here.engine.close()
    pair.there.engine.close()


def test_a_description_that_is_none_or_of_another_engine_is_refused(pair: Pair, name: str) -> None:
    with pytest.raises(TransferError):
        pair.here.engine.connect(b"nonsense")
    other = End("ucx" if name != "ucx" else "same_host", 64)
    with pytest.raises(TransferError, match="the peer is"):
        pair.here.engine.connect(other.engine.describe())
    other.engine.close()


def test_memory_of_another_fingerprint_is_refused(pair: Pair, name: str) -> None:
    other = End(name, 64, fingerprint="g")
    with pytest.raises(FingerprintMismatch, match="'g', this end 'f'"):
        pair.here.engine.connect(other.engine.describe())
    other.engine.close()


def test_a_cancelled_transfer_ends_soon_and_the_pair_still_works(pair: Pair) -> None:
    pair.fill()
    engine = pair.here.engine
    handles = [engine.pull(pair.peer, pair.runs([(p, p) for p in range(PAGES)]), HOST, HOST) for _ in range(3)]
    assert wait_for(lambda: min(map(engine.release, handles)), pair.there.engine)
    pair.here.data[:] = 0
    wait_for(lambda: False, pair.here.engine, pair.there.engine, wait_s=0.3)
    assert not pair.here.data.any()
    assert pair.pull(pair.runs([(3, 4)])) is Progress.DONE
    assert np.array_equal(pair.here.pages(PAGE)[3], pair.there.pages(PAGE)[4])


def test_a_peer_killed_before_a_transfer_is_gone(alone: End, victim: Victim) -> None:
    peer = alone.engine.connect(victim.description)
    handle = alone.engine.pull(peer, [Run(alone.address, victim.address, PAGE)], HOST, HOST)
    assert alone.finish(handle, alone.engine) is Progress.DONE
    assert (alone.data[:PAGE] == 9).all()
    victim.process.kill()
    victim.process.wait()
    wait_for(lambda: False, alone.engine, wait_s=0.1)
    try:
        handle = alone.engine.pull(peer, [Run(alone.address, victim.address, PAGE)], HOST, HOST)
        state = alone.finish(handle, alone.engine)
    except PeerGone:
        state = Progress.FAILED
    assert state is Progress.FAILED
    alone.engine.forget(peer)
    with pytest.raises(TransferError):
        alone.engine.pull(peer, [Run(alone.address, victim.address, PAGE)], HOST, HOST)


def test_a_peer_killed_in_the_middle_fails_its_transfers(alone: End, victim: Victim, name: str) -> None:
    peer = alone.engine.connect(victim.description)
    first = alone.engine.pull(peer, [Run(alone.address, victim.address, PAGE)], HOST, HOST)
    assert alone.finish(first, alone.engine) is Progress.DONE
    # Enough of them that some are under way when the peer dies.
    whole = [Run(alone.address, victim.address, LARGE)]
    handles = [alone.engine.pull(peer, whole, HOST, HOST) for _ in range(4)]
    victim.process.kill()
    states = [alone.finish(handle, alone.engine) for handle in handles]
    assert Progress.RUNNING not in states
    if name != "nixl":  # whose reads of a process of the same host end within the call
        assert states[-1] is Progress.FAILED
    assert all(alone.engine.release(handle) for handle in handles)


def test_a_transfer_from_a_stopped_peer_can_be_cancelled(alone: End, victim: Victim) -> None:
    peer = alone.engine.connect(victim.description)
    first = alone.engine.pull(peer, [Run(alone.address, victim.address, PAGE)], HOST, HOST)
    assert alone.finish(first, alone.engine) is Progress.DONE
    victim.process.send_signal(signal.SIGSTOP)
    handle = alone.engine.pull(peer, [Run(alone.address, victim.address, 64 * PAGE)], HOST, HOST)
    alone.finish(handle, alone.engine, wait_s=0.5)
    assert wait_for(lambda: alone.engine.release(handle), alone.engine)


def test_a_closed_engine_leaves_its_peers_with_an_error(name: str) -> None:
    pair = Pair(name)
    assert pair.pull(pair.runs([(0, 0)])) is Progress.DONE
    pair.there.engine.close()
    if name in ("ucx", "nccl"):
        wait_for(lambda: False, pair.here.engine, wait_s=0.1)
        with pytest.raises(TransferError):
            pair.here.engine.pull(pair.peer, pair.runs([(0, 0)]), HOST, HOST)
    pair.here.engine.close()


def test_gpu_memory_is_refused_by_an_engine_for_host_memory(name: str) -> None:
    if name == "nixl":
        pytest.skip("NIXL refuses it in its own words")
    end = End(name, 64)
    with pytest.raises(TransferError, match="host memory"):
        end.engine.register([Region(end.address, 8, type(HOST)(0))])
    end.engine.close()
