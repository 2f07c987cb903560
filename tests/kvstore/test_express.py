"""Express pulls: what they do themselves, and what they leave to the mover."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from llmserve.kvstore.transfer.base import Place, Run
from llmserve.kvstore.transfer.express import Express
from llmserve.kvstore.transfer.ladder import Rung
from llmserve.kvstore.transfer.orders import Ends, Fetch, Fetched
from tests.kvstore.ends import End
from tests.kvstore.faulty import FaultyEngine

HOST = Place()
SIZE = 1 << 20


class Bench:
    """An express and the end that it pulls from."""

    def __init__(self) -> None:
        self.here, self.there = End("same_host", SIZE), End("same_host", SIZE)
        self.there.write(5)
        self.engine = FaultyEngine(self.here.engine)
        self.left: list[Fetch] = []
        self.charged: list[int] = []
        self.permitted = True
        self.express = Express(self.engine, self.left.append, self.permits)
        self.ends = Ends("m", {"same_host": self.there.engine.describe()})

    def permits(self, size_bytes: int) -> bool:
        if self.permitted:
            self.charged.append(size_bytes)
        return self.permitted

    def order(self, *, timeout_s: float = 10.0) -> Fetch:
        here, there = self.here.address, self.there.address
        pages, fence = Run(here, there, SIZE // 2), Run(here + SIZE - 8, there + SIZE - 8, 8)
        return Fetch("r", self.ends, [pages], HOST, HOST, fence, timeout_s)

    def ended(self) -> list[Fetched]:
        deadline_s = time.monotonic() + 10
        while not (found := self.express.take_ended()) and not self.left:
            assert time.monotonic() < deadline_s
            time.sleep(0.001)
        return found


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.express.close()
    bench.there.engine.close()


def test_pages_and_fence_come_and_the_bytes_are_charged(bench: Bench) -> None:
    assert bench.express.fetch(bench.order())
    (fetched,) = bench.ended()
    assert (fetched.failure, [(a.rung, a.bytes_moved) for a in fetched.attempts]) == (
        "",
        [(Rung("same_host", "pull"), SIZE // 2)],
    )
    assert set(np.flatnonzero(bench.here.read())) == {*range(SIZE // 2), *range(SIZE - 8, SIZE)}
    assert bench.charged == [SIZE // 2]
    assert bench.left == []


@pytest.mark.parametrize("fault", ["connect", "submit", "gone"])
def test_what_cannot_be_started_is_left_to_the_mover_and_not_tried_again_at_once(bench: Bench, fault: str) -> None:
    bench.engine.fault = fault  # type: ignore[assignment]
    assert not bench.express.fetch(bench.order())
    bench.engine.fault = ""
    assert not bench.express.fetch(bench.order())
    time.sleep(2.05)
    assert bench.express.fetch(bench.order())


def test_a_pull_that_ends_with_an_error_is_ordered_from_the_mover(bench: Bench) -> None:
    bench.engine.fault = "completion"
    order = bench.order()
    assert bench.express.fetch(order)
    assert bench.ended() == []
    assert bench.left == [order]


def test_a_pull_that_stalls_is_ordered_from_the_mover_once_it_is_off(bench: Bench) -> None:
    bench.engine.fault = "stall"
    order = bench.order(timeout_s=0.2)
    assert bench.express.fetch(order)
    assert bench.express.take_ended() == []
    assert bench.left == []
    assert bench.ended() == []
    assert bench.left == [order]


def test_a_fetch_that_the_bucket_holds_back_or_whose_lease_is_over_is_left_to_the_mover(bench: Bench) -> None:
    bench.permitted = False
    assert not bench.express.fetch(bench.order())
    bench.permitted = True
    assert not bench.express.fetch(replace(bench.order(), expires_s=time.monotonic() - 1))
    assert bench.express.fetch(replace(bench.order(), expires_s=math.inf))


def test_a_peer_without_this_engine_is_left_to_the_mover(bench: Bench) -> None:
    assert not bench.express.fetch(replace(bench.order(), ends=Ends("m", {"nixl": b"x"})))


def test_a_load_has_ended_when_the_next_work_begins(bench: Bench) -> None:
    assert bench.express.load(bench.order())
    assert set(np.flatnonzero(bench.here.read())) == set(range(SIZE // 2)), "the fence is read when it is asked for"
    (fetched,) = bench.express.finish_loads()
    assert (fetched.id, fetched.failure, fetched.attempts[0].bytes_moved) == ("r", "", SIZE // 2)
    assert set(np.flatnonzero(bench.here.read())) == {*range(SIZE // 2), *range(SIZE - 8, SIZE)}
    assert bench.express.finish_loads() == []


def test_a_load_that_fails_is_said_to_have_failed_and_tried_nowhere_else(bench: Bench) -> None:
    bench.engine.fault = "completion"
    assert bench.express.load(bench.order())
    (fetched,) = bench.express.finish_loads()
    assert fetched.failure == "peer"
    assert bench.left == []
    bench.engine.fault = ""
    assert not bench.express.load(bench.order()), "not at once again"
