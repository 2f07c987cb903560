"""Engines of unequal tensor parallelism that meet over real page movers: refused before the first byte, with the
reason."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest

from llmserve.kvstore.transfer import open_engine, unavailable
from llmserve.kvstore.transfer.base import EngineOptions, Place, Region
from llmserve.kvstore.transfer.mover import Mover
from llmserve.kvstore.transfer.pacing import TokenBucket
from llmserve.kvstore.transfer.pages import Strip
from llmserve.workers.connector import layout
from llmserve.workers.connector.at_once import AtOnce
from llmserve.workers.connector.leases import LeaseTable
from llmserve.workers.connector.meta import Pull, RankMeta, StepMeta
from llmserve.workers.connector.scheduler import SchedulerSettings, SchedulerSide
from llmserve.workers.connector.wire import HANDOFF, HOLD, Handoff, RankPages, decode_handoff, encode
from llmserve.workers.connector.worker import WorkerSide
from tests.workers.connector.test_scheduler_side import Asked, Blocks

PAGE_TOKENS, PAGE_BYTES, PAGES = 16, 4096, 4


def fingerprint(tp: int) -> str:
    """As the connector makes it; the pages of both kinds look alike."""
    config = SimpleNamespace(
        model_config=SimpleNamespace(hf_text_config=SimpleNamespace(to_dict=dict), revision=None, dtype="bfloat16"),
        cache_config=SimpleNamespace(cache_dtype="auto", kv_cache_layout="BLHNC", block_size=PAGE_TOKENS),
        parallel_config=SimpleNamespace(tensor_parallel_size=tp, pipeline_parallel_size=1),
    )
    return layout.fingerprint(config, "model", (2, PAGE_TOKENS), on_cpu=False)


class Rank:
    """The worker side of one rank over one transfer engine."""

    def __init__(self, engine: str, tp: int, number: int) -> None:
        self.pages = np.zeros((PAGES, PAGE_BYTES), dtype=np.uint8)
        self.table, fence = LeaseTable(4), WorkerSide.fence_table()
        opened = open_engine(engine, EngineOptions(fingerprint=fingerprint(tp)))
        memory = [(int(self.pages.ctypes.data), self.pages.nbytes)]
        memory += [(table.address, table.size_bytes) for table in (self.table, fence)]
        opened.register([Region(address, size, Place()) for address, size in memory])
        strip = Strip(memory[0][0], PAGE_BYTES, PAGE_BYTES)
        self.mover = Mover([opened], TokenBucket(math.inf, 1.0, time.monotonic()))
        self.side = WorkerSide(
            self.mover,
            strips=[[strip]],
            place=Place(),
            table=self.table,
            fence=fence,
            rank=f"0/{number}",
            timeout_s=10.0,
        )
        said = RankPages(self.mover.ends, None, [[(strip.base, PAGE_BYTES, PAGE_BYTES)]], self.table.address)
        self.meta = RankMeta(fingerprint(tp), encode(said))


class Engine:
    """The connector of one engine without the engine."""

    def __init__(self, engine: str, tp: int) -> None:
        settings = SchedulerSettings(
            engine_id=f"tp{tp}",
            lease_s=30.0,
            tp=tp,
            pp=1,
            groups=(0,),
            page_tokens=(PAGE_TOKENS,),
            slots=4,
            ahead=False,
        )
        self.ranks = [Rank(engine, tp, number) for number in range(tp)]
        self.scheduler = SchedulerSide(settings, lambda _: ([0],), AtOnce(0, tp, lambda _: True), lambda _: None)
        self.scheduler.set_ranks({(0, number): rank.meta for number, rank in enumerate(self.ranks)})

    def step(self) -> None:
        meta = self.scheduler.take_meta({"x": 1})
        for rank in self.ranks:
            rank.side.begin(meta)

    def prefill(self) -> Handoff:
        """Of a prompt that fills pages 1 and 2 of each rank."""
        request = Asked("p", 2 * PAGE_TOKENS, {HOLD: True})
        self.scheduler.on_new_request(request)
        self.scheduler.allocated(request, Blocks([1, 2]), 0)
        for rank in self.ranks:
            rank.pages[1:3] = 7
        self.step()
        _, params = self.scheduler.finished(request, ([1, 2],), hold=True)
        self.step()
        return decode_handoff((params or {})[HANDOFF])


@pytest.fixture(params=["same_host", "ucx"])
def engines(request: pytest.FixtureRequest) -> Iterator[dict[str, Engine]]:
    """Two of two ranks and one of one."""
    if reason := unavailable(request.param):
        pytest.skip(f"{request.param}: {reason}")
    made = {name: Engine(request.param, tp) for name, tp in (("two", 2), ("two again", 2), ("one", 1))}
    yield made
    for rank in [rank for engine in made.values() for rank in engine.ranks]:
        rank.side.close()


def read(rank: Rank, handoff: Handoff) -> bool:
    """Whether the rank has got the pages 1 and 2."""
    rank.side.begin(StepMeta(pull={"d": Pull(handoff, [[1, 2]], [[1, 2]], time.monotonic())}))
    deadline_s = time.monotonic() + 10.0
    while not (results := rank.side.advance()).received and time.monotonic() < deadline_s:
        time.sleep(0.001)
    assert results.received == {"d"}
    return not results.failed


def failures(engine: Engine) -> list[str]:
    stats = engine.ranks[0].side.take_stats()
    return [] if stats is None else [transfer[4] for transfer in stats.data["transfers"]]


def test_a_handoff_of_unequal_tensor_parallelism_is_declined_with_the_reason_and_counted(
    engines: dict[str, Engine], caplog: pytest.LogCaptureFixture
) -> None:
    one = engines["one"]
    request = Asked("d", 2 * PAGE_TOKENS + 1, {HANDOFF: encode(engines["two"].prefill())})
    one.scheduler.on_new_request(request)
    assert one.scheduler.matched_tokens(request, 0) == (0, False)
    assert "the prefill worker has TP 2 and PP 1, this one 1 and 1; only equal ones hand over" in caplog.text
    one.step()
    assert failures(one) == ["fingerprint"]
    assert one.ranks[0].mover.under_way == 0


def test_a_rank_that_asks_for_such_pages_all_the_same_is_refused_when_its_engine_connects(
    engines: dict[str, Engine], caplog: pytest.LogCaptureFixture
) -> None:
    one = engines["one"]
    assert not read(one.ranks[0], engines["two"].prefill())
    assert failures(one) == ["fingerprint"]
    assert f"the peer holds {fingerprint(2)!r}, this end {fingerprint(1)!r}" in caplog.text
    assert not one.ranks[0].pages.any()


def test_each_rank_of_equal_tensor_parallelism_reads_its_own_part(engines: dict[str, Engine]) -> None:
    handoff = engines["two"].prefill()
    for rank in engines["two again"].ranks:
        assert read(rank, handoff)
        assert list(rank.pages[:, 0]) == [0, 7, 7, 0]
