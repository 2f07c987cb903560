"""NIXL between two agents of this process: real memory, real UCX."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest

from llmserve.kvstore import transfer
from llmserve.kvstore.transfer import EngineOptions, make_engine
from llmserve.kvstore.transfer.base import Handle, Place, Progress, Region, Run, TransferEngine, TransferError
from llmserve.kvstore.transfer.nixl import available

HOST = Place()
pytestmark = pytest.mark.skipif(available() is not None, reason=f"NIXL: {available()}")


class End:
    """An engine with a buffer of 64 KiB."""

    def __init__(self, fill: int) -> None:
        self.engine = make_engine(["nixl"], EngineOptions(gpu=False))
        self.data = np.full(65536, fill, dtype=np.uint8)
        self.address = int(self.data.ctypes.data)
        self.engine.register([Region(self.address, self.data.nbytes, HOST)])


@pytest.fixture(scope="module")
def ends() -> Iterator[tuple[End, End]]:
    pair = End(1), End(2)
    yield pair
    for end in pair:
        end.engine.close()


def finish(engine: TransferEngine, handle: Handle, other: TransferEngine) -> Progress:
    deadline = time.monotonic() + 20
    while (progress := engine.poll(handle)) is Progress.RUNNING and time.monotonic() < deadline:
        other.notifications()
    assert engine.release(handle)
    return progress


def test_a_pull_copies_exactly_the_runs(ends: tuple[End, End]) -> None:
    here, there = ends
    here.data[:], there.data[:] = 1, 2
    peer = here.engine.connect(there.engine.describe())
    runs = [Run(here.address + 100, there.address + 50, 10), Run(here.address + 300, there.address, 7)]
    handle = here.engine.pull(peer, runs, HOST, HOST)
    assert handle.bytes_moved == 17
    assert finish(here.engine, handle, there.engine) is Progress.DONE
    assert set(np.flatnonzero(here.data == 2)) == {*range(100, 110), *range(300, 307)}


def test_a_push_writes_into_the_peer(ends: tuple[End, End]) -> None:
    here, there = ends
    here.data[:], there.data[:] = 3, 4
    peer = here.engine.connect(there.engine.describe())
    handle = here.engine.push(peer, [Run(here.address, there.address + 9, 5)], HOST, HOST)
    assert finish(here.engine, handle, there.engine) is Progress.DONE
    assert set(np.flatnonzero(there.data == 3)) == set(range(9, 14))


def test_notifications_arrive_in_order(ends: tuple[End, End]) -> None:
    here, there = ends
    peer = here.engine.connect(there.engine.describe())
    for number in range(5):
        here.engine.notify(peer, b"n%d" % number)
    received: list[bytes] = []
    deadline = time.monotonic() + 20
    while len(received) < 5 and time.monotonic() < deadline:
        received += there.engine.notifications()
        here.engine.notifications()
    assert received == [b"n%d" % number for number in range(5)]


def test_a_forgotten_peer_cannot_be_read_and_can_be_connected_again(ends: tuple[End, End]) -> None:
    here, there = ends
    peer = here.engine.connect(there.engine.describe())
    here.engine.forget(peer)
    with pytest.raises(TransferError):
        here.engine.pull(peer, [Run(here.address, there.address, 8)], HOST, HOST)
    peer = here.engine.connect(there.engine.describe())
    handle = here.engine.pull(peer, [Run(here.address, there.address, 8)], HOST, HOST)
    assert finish(here.engine, handle, there.engine) is Progress.DONE


def test_a_description_that_is_none_is_refused(ends: tuple[End, End]) -> None:
    with pytest.raises(TransferError):
        ends[0].engine.connect(b"nonsense")


def test_engines_that_are_not_built_are_skipped_with_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine(["ucx", "nixl"], EngineOptions(gpu=False))
    engine.close()
    assert engine.name == "nixl"
    assert "ucx is skipped: not built yet" in caplog.text


def test_a_ladder_without_a_usable_rung_is_an_error() -> None:
    with pytest.raises(TransferError, match="nccl: not built yet"):
        make_engine(["nccl"], EngineOptions(gpu=False))


def test_the_reason_can_be_asked_for() -> None:
    assert transfer.unavailable("nixl") is None
    assert transfer.unavailable("ucx") == "not built yet"
