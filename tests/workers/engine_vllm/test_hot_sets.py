"""Hot sets in DRAM, in vLLM's own manager of its chunks but without an engine."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from tests.workers.engine_vllm.test_page_tier import context, key

CHUNKS = 16


class Dram:
    """vLLM's manager of ``CHUNKS`` chunks with our policy, called as its scheduler does."""

    def __init__(self, **hot_chunks: float) -> None:
        from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager

        from llmserve.workers.offload.policy import hot_sets_of

        module = "llmserve.workers.offload.policy"
        self.manager = CPUOffloadingManager(CHUNKS, "HotSetPolicy", module)
        # As in the tiering's primary tier: secondary tiers write under a name of their own.
        self.manager.prepare_write = self.manager.prepare_store
        self.policy = hot_sets_of(self.manager)
        self.policy.promise({f"t-{name}": chunks for name, chunks in hot_chunks.items()})
        self._requests = itertools.count()

    def request(self, space: str) -> Any:
        ctx = context(space, f"r{next(self._requests)}")
        self.manager.on_new_request(ctx)
        return ctx

    def begin(self, numbers: Sequence[int], ctx: Any, *, promotion: bool = False) -> bool:
        """Whether there are chunks for them."""
        prepare = self.manager.prepare_write if promotion else self.manager.prepare_store
        return prepare([key(number) for number in numbers], ctx) is not None

    def end(self, numbers: Sequence[int], ctx: Any, *, success: bool = True) -> None:
        self.manager.complete_store([key(number) for number in numbers], ctx, success)

    def store(self, numbers: Sequence[int], space: str) -> bool:
        ctx = self.request(space)
        stored = self.begin(numbers, ctx)
        if stored:
            self.end(numbers, ctx)
        return stored

    def held(self) -> dict[str, int]:
        """Chunks by space."""
        return dict(Counter(str(self.policy.space_of(name)) for name in self.policy._chunks))


def test_a_tenant_whose_own_chunks_are_all_in_use_takes_none_from_anothers_hot_set() -> None:
    dram = Dram(a=12)
    assert dram.store(range(12), "t-a")
    loads = [(range(first, first + 4), dram.request("t-b")) for first in range(100, 116, 4)]
    assert [dram.begin(numbers, ctx) for numbers, ctx in loads] == [True, False, False, False]
    assert dram.held() == {"t-a": 12, "t-b": 4}
    # Once its own are idle they make room.
    dram.end(*loads[0])
    assert dram.begin(*loads[1])
    assert dram.held() == {"t-a": 12, "t-b": 4}


def test_a_tenant_spends_its_own_hot_set_before_it_waits() -> None:
    dram = Dram(a=12)
    assert dram.store(range(12), "t-a")
    busy = dram.request("t-b")
    assert dram.begin(range(100, 104), busy)
    assert dram.store(range(20, 24), "t-a")
    assert dram.held() == {"t-a": 12, "t-b": 4}


@pytest.mark.parametrize("promised", [16.0, 100.0])
def test_hot_sets_of_all_dram_and_more_leave_chunks_for_those_without(promised: float) -> None:
    dram = Dram(a=promised)
    assert dram.store(range(CHUNKS), "t-a")
    assert dram.store(range(100, 104), "t-b")
    assert dram.held() == {"t-a": 12, "t-b": 4}


def test_a_page_that_could_not_be_promoted_and_is_stored_belongs_to_its_tenant() -> None:
    dram = Dram()
    ctx = dram.request("t-a")
    assert dram.begin([1], ctx, promotion=True)
    dram.end([1], ctx, success=False)
    assert dram.begin([1], ctx)
    assert dram.held() == {"t-a": 1}


def test_a_page_stored_at_the_second_try_belongs_to_its_tenant_though_another_stored_between() -> None:
    dram = Dram()
    busy = dram.request("t-b")
    assert dram.begin(range(CHUNKS), busy)
    ctx = dram.request("t-a")
    assert not dram.begin([100], ctx)
    dram.end(range(CHUNKS), busy)
    assert dram.store([200], "t-b")
    assert dram.begin([100], ctx)
    assert dram.policy.space_of(key(100)) == "t-a"


def test_a_promoted_page_belongs_to_its_tenant() -> None:
    dram = Dram()
    assert dram.begin([1], dram.request("t-a"), promotion=True)
    assert dram.held() == {"t-a": 1}


def test_what_is_stored_for_nobody_has_no_hot_set() -> None:
    from vllm.v1.kv_offload.base import ReqContext

    dram = Dram(a=4)
    assert dram.store(range(4), "t-a")
    nobody = ReqContext("nobody", None)
    assert dram.begin(range(100, 112), nobody)
    dram.end(range(100, 112), nobody)
    assert dram.store(range(200, 212), "t-b")
    assert dram.held() == {"t-a": 4, "t-b": 12}


def a_policy(capacity: int, **hot: float) -> Any:
    from llmserve.workers.offload.policy import HotSetPolicy

    policy = HotSetPolicy(capacity)
    policy.promise({f"t-{name}": chunks for name, chunks in hot.items()})
    return policy


def put(policy: Any, number: int, space: str) -> Any:
    from vllm.v1.kv_offload.cpu.policies.base import ChunkStatus

    chunk = ChunkStatus(number)
    chunk.ref_cnt = 0
    with policy.on_behalf_of(space):
        policy.insert(key(number), chunk)
    return chunk


def test_in_dram_a_noisy_tenant_evicts_its_own_chunks() -> None:
    policy = a_policy(8, a=3)
    for number in range(3):
        put(policy, number, "t-a")
    for number in range(10, 60):
        if number >= 15:
            assert len(policy.evict(1, set())) == 1
        put(policy, number, "t-b")
    assert all(policy.get(key(number)) for number in range(3))


def test_chunks_in_use_or_protected_stay_and_an_eviction_that_is_too_large_changes_nothing() -> None:
    policy = a_policy(8)
    chunks = [put(policy, number, "t-a") for number in range(4)]
    chunks[0].ref_cnt = 1
    chunks[1].ref_cnt = -1
    assert policy.evict(2, {key(2)}) is None
    assert policy.evict(0, set()) == []
    assert [name for name, _ in policy.evict(1, {key(2)})] == [key(3)]
    assert policy.get(key(3)) is None


def test_the_end_of_a_prefix_goes_before_its_beginning() -> None:
    policy = a_policy(8)
    for number in range(3):
        put(policy, number, "t-a")
    policy.touch([key(0), key(1), key(2)], context())
    assert [name for name, _ in policy.evict(2, set())] == [key(2), key(1)]
    policy.clear()
    assert policy.get(key(0)) is None
