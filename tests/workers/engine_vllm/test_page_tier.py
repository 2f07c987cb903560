"""The classes that vLLM's offloading loads, without an engine: a tier that never blocks."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmserve.kvstore.codec import PageKind
from llmserve.manifests.schema import StorageClass
from llmserve.workers.offload.params import tier_params
from llmserve.workers.offload.settings import TierSettings, to_builtins

ROW = 8192
KIND = PageKind("bf16", ROW, 64)
ROWS = 64
PAGE_TOKENS = 16


def context(space: str = "t-a", request: str = "r", **params: Any) -> Any:
    from vllm.v1.kv_offload.base import ReqContext

    return ReqContext(request, {**tier_params(space), **params})


def key(number: int) -> Any:
    from vllm.v1.kv_offload.base import make_offload_key

    return make_offload_key(number.to_bytes(32, "big"), 0)


class Tier:
    """A ``PageTier`` over ``ROWS`` rows of memory, driven as vLLM's manager does."""

    def __init__(self, *classes: StorageClass) -> None:
        from llmserve.workers.offload.tier import PageTier

        self.memory = np.zeros((ROWS, ROW), np.uint8)
        self.tier = PageTier(None, memoryview(self.memory), "PageTier", **to_builtins(TierSettings(classes=classes)))  # type: ignore[arg-type]
        self.jobs = 0

    def open(self) -> Tier:
        self.tier.open("f00d" * 4, KIND, PAGE_TOKENS)
        return self

    def job(self, numbers: list[int], rows: list[int], ctx: Any) -> Any:
        from vllm.v1.kv_offload.tiering.base import TransferJob

        self.jobs += 1
        keys = [key(number) for number in numbers]
        for position, name in enumerate(keys):
            ctx.set_offload_key_position(name, (position + 1) * PAGE_TOKENS)
        return TransferJob(self.jobs, keys, np.array(rows, np.int32), False, ctx)

    def store(self, numbers: list[int], ctx: Any = None) -> Any:
        """Store rows filled with their numbers; returns the job's result."""
        for row, number in enumerate(numbers):
            self.memory[row] = number
        self.tier.submit_store(self.job(numbers, list(range(len(numbers))), ctx or context()))
        return self.result()

    def load(self, numbers: list[int], ctx: Any = None) -> Any:
        rows = [ROWS // 2 + row for row in range(len(numbers))]
        self.memory[rows] = 0
        self.tier.submit_load(self.job(numbers, rows, ctx or context()))
        return self.result()

    def result(self) -> Any:
        return until(lambda: next(iter(self.tier.get_finished_jobs()), None))

    def lookup(self, number: int, ctx: Any = None) -> str:
        """The final answer, after as many steps as it takes."""
        ctx = ctx or context()

        def answer() -> str:
            name: str = self.tier.lookup(key(number), ctx).name
            self.tier.on_schedule_end(None)
            return "" if name == "RETRY" else name

        return str(until(answer))


def until(answer: Callable[[], Any], timeout_s: float = 10.0) -> Any:
    end_s = time.monotonic() + timeout_s
    while not (found := answer()):
        assert time.monotonic() < end_s
        time.sleep(0.002)
    return found


@pytest.fixture
def disk(tmp_path: Path) -> StorageClass:
    return StorageClass(name="disk", type="filesystem", path=str(tmp_path))


@pytest.fixture
def tier(disk: StorageClass) -> Iterator[Tier]:
    made = Tier(disk).open()
    yield made
    made.tier.shutdown()


def test_what_is_stored_is_found_and_loaded_by_another_worker_too(tier: Tier, disk: StorageClass) -> None:
    assert tier.lookup(1) == "MISS"
    assert tier.store([1, 2, 3]).success
    until(lambda: tier.lookup(3) == "HIT")
    other = Tier(disk).open()
    try:
        assert [other.lookup(number) for number in (1, 2, 3, 4)] == ["HIT", "HIT", "HIT", "MISS"]
        result = other.load([1, 2, 3])
        assert result.success
        assert [int(row[0]) for row in other.memory[ROWS // 2 : ROWS // 2 + 3]] == [1, 2, 3]
    finally:
        other.tier.shutdown()


def test_nothing_is_found_or_kept_for_a_request_without_a_tenant_or_another_one(tier: Tier, tmp_path: Path) -> None:
    from vllm.v1.kv_offload.base import ReqContext

    nobody = ReqContext("r", None)
    assert tier.store([1], nobody).success
    assert tier.store([2]).success
    until(lambda: tier.lookup(2) == "HIT")
    assert tier.lookup(2, nobody) == "MISS"
    assert tier.lookup(2, context("t-b")) == "MISS"
    assert len(list(tmp_path.rglob("*.kv"))) == 1


def test_what_was_handed_over_is_kept_by_the_prefill_worker_alone(tier: Tier, tmp_path: Path) -> None:
    tier.store([1, 2, 3], context(kept_tokens=32))
    until(lambda: tier.lookup(3, context()) == "HIT")
    assert len(list(tmp_path.rglob("*.kv"))) == 1


def test_lost_pages_are_reported_one_by_one_and_forgotten(tier: Tier, tmp_path: Path) -> None:
    tier.store([1, 2])
    until(lambda: tier.lookup(2) == "HIT")
    next(path for path in tmp_path.rglob("*.kv") if path.name.startswith("0" * 62 + "01")).unlink()
    result = tier.load([1, 2])
    assert (result.success, list(result.successful_keys)) == (False, [key(2)])
    until(lambda: tier.lookup(1) == "MISS")


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyError("no"), MemoryError(), OSError(5, "no")], ids=repr)
def test_what_its_class_has_but_cannot_yield_is_not_asked_for_again_and_again(
    tier: Tier, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One page: that the class says that it has it closes its breaker again each time."""
    from llmserve.kvstore.stores.filesystem import FilesystemStore

    def fail(store: FilesystemStore, path: str) -> bytes | None:
        raise error

    tier.store([1])
    until(lambda: tier.lookup(1) == "HIT")
    with monkeypatch.context() as broken:
        broken.setattr(FilesystemStore, "_read", fail)
        assert not tier.load([1]).success
        until(lambda: tier.lookup(1) == "MISS")
        time.sleep(0.6)
        assert tier.lookup(1) == "MISS"
    assert until(lambda: _count(tier, "failures")) == 1
    # Whoever computes it keeps it again.
    assert tier.store([1]).success
    until(lambda: tier.lookup(1) == "HIT")
    assert tier.load([1]).success


def test_a_file_that_cannot_be_read_is_replaced_when_its_page_was_computed(
    tier: Tier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmserve.kvstore.stores.filesystem import FilesystemStore

    tier.store([1])
    until(lambda: tier.lookup(1) == "HIT")
    broken = next(tmp_path.rglob("*.kv"))
    bad_sectors, read = broken.stat().st_ino, FilesystemStore._read

    def read_or_fail(store: FilesystemStore, path: str) -> bytes | None:
        if broken.stat().st_ino == bad_sectors:
            raise OSError(5, "no")
        return read(store, path)

    # The file stays, so that its number goes to no other one.
    (tmp_path / "aside").hardlink_to(broken)
    monkeypatch.setattr(FilesystemStore, "_read", read_or_fail)
    assert not tier.load([1]).success
    until(lambda: tier.lookup(1) == "MISS")
    assert tier.store([1]).success
    until(lambda: tier.lookup(1) == "HIT")
    assert tier.load([1]).success


def test_before_the_engine_says_what_its_pages_are_nothing_is_kept(disk: StorageClass, tmp_path: Path) -> None:
    made = Tier(disk)
    assert made.store([1]).success
    assert made.lookup(1) == "MISS"
    assert not list(tmp_path.rglob("*.kv"))
    made.tier.shutdown()


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://10.255.255.1:9"], ids=["refuses", "hangs"])
def test_a_bucket_that_is_out_of_reach_blocks_no_step(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmserve.kvstore.stores.s3 import S3Store

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    bucket = StorageClass(name="object", type="s3", bucket="b", region="r", endpoint_url=url, timeout_s=0.5)
    steps_are_over, called_in = threading.Event(), set()
    ask = S3Store._call

    async def ask_after_the_steps(store: S3Store, call: Any) -> Any:
        called_in.add(threading.get_ident())
        while not steps_are_over.is_set():
            await asyncio.sleep(0.01)
        return await ask(store, call)

    monkeypatch.setattr(S3Store, "_call", ask_after_the_steps)
    made = Tier(bucket).open()
    try:
        for number in range(20):
            made.tier.submit_store(made.job([number], [0], context()))
            made.tier.lookup(key(100 + number), context())
            made.tier.on_schedule_end(None)
            list(made.tier.get_finished_jobs())
        # A step that waits for an answer of the bucket never ends.
        steps_are_over.set()
        assert made.lookup(500) == "MISS"
        # The rows are free again although nothing could be written.
        made.tier.drain_jobs()
        assert called_in
        assert threading.get_ident() not in called_in
    finally:
        steps_are_over.set()
        made.tier.shutdown()


def test_the_end_of_what_is_too_much_at_once_is_dropped_and_counted(
    disk: StorageClass, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmserve.workers.offload import tier as module

    monkeypatch.setattr(module, "_BACKLOG", 4 / ROWS)
    made = Tier(disk).open()
    try:
        assert made.store(list(range(8))).success
        assert until(lambda: _count(made, "dropped")) == 4
        # The beginning of the prefix is what was kept.
        assert [made.lookup(number) for number in (0, 3, 4)] == ["HIT", "HIT", "MISS"]
    finally:
        made.tier.shutdown()


def test_what_was_written_since_the_last_step_makes_room_for_more(
    disk: StorageClass, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of a long prompt takes seconds."""
    from llmserve.workers.offload import tier as module

    monkeypatch.setattr(module, "_BACKLOG", 4 / ROWS)
    store, written = module.PageTier._store, []

    async def store_and_tell(tier: Any, *arguments: Any) -> None:
        await store(tier, *arguments)
        written.append(arguments)

    monkeypatch.setattr(module.PageTier, "_store", store_and_tell)
    made = Tier(disk).open()
    try:
        for number, first in enumerate((1, 5, 9), 1):
            made.store(list(range(first, first + 4)))
            until(lambda: len(written) == number)  # noqa: B023 (asked at once)
        assert _count(made, "dropped") == 0
    finally:
        made.tier.shutdown()


def test_what_loads_slower_than_it_computes_is_computed(tier: Tier, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmserve.kvstore.stores.filesystem import FilesystemStore

    read = FilesystemStore._read

    def slowly(store: FilesystemStore, path: str) -> bytes | None:
        time.sleep(0.05)
        return read(store, path)

    monkeypatch.setattr(FilesystemStore, "_read", slowly)
    fast, slow = (context(compute_tokens_s=PAGE_TOKENS / page_s) for page_s in (0.001, 10.0))
    assert tier.store(list(range(8))).success
    until(lambda: tier.lookup(7, fast) == "HIT")
    assert tier.load(list(range(8)), fast).success
    assert tier.lookup(0, fast) == "MISS"
    assert tier.lookup(0, slow) == "HIT"
    assert tier.lookup(0, context()) == "HIT"


def _count(made: Tier, what: str) -> float:
    stats = made.tier.get_stats()
    values = stats.data["data"].get(f"llmserve_tier:{what}:disk", {}) if stats is not None else {}
    return float(sum(values.values()))
