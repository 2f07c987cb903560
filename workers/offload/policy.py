"""The DRAM tier's order of eviction: ``kvstore.hotset`` behind vLLM's interface."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vllm.v1.kv_offload.cpu.policies.base import CachePolicy, ChunkStatus, order_request_keys

from llmserve.kvstore.hotset import HotSets, Page
from llmserve.workers.offload.params import NOBODY, space_of_request

if TYPE_CHECKING:
    from vllm.v1.kv_offload.base import OffloadKey, PrepareStoreOutput, ReqContext
    from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager

_RESERVE = 8
"""Of so many chunks one is in no hot set: what a request loads or stores needs a chunk first, whosever it is."""
_RESERVE_CHUNKS = 4
"""At least, in a small DRAM tier up to half of it."""


class HotSetPolicy(CachePolicy):  # type: ignore[misc]  # vLLM is untyped
    """Chunks of DRAM by space; a space keeps its hot set whatever the others do."""

    def __init__(self, cache_capacity: int) -> None:
        super().__init__(cache_capacity)
        self._chunks: dict[OffloadKey, ChunkStatus] = {}
        self._hot_chunks: Mapping[str, float] = {}
        self._sets = self._new_sets()
        self._space = NOBODY
        """For which chunks are inserted and evicted now."""
        self._clock = 0

    def promise(self, hot_chunks: Mapping[str, float]) -> None:
        """Hot sets in chunks by space, before the first insertion: vLLM makes the policy with a capacity only."""
        assert not self._chunks
        self._hot_chunks = hot_chunks
        self._sets = self._new_sets()

    def _new_sets(self) -> HotSets[OffloadKey]:
        capacity = self.cache_capacity
        reserve = min(capacity / 2, max(_RESERVE_CHUNKS, capacity / _RESERVE))
        return HotSets(capacity - reserve, self._hot_chunks)

    def space_of(self, key: OffloadKey) -> str | None:
        """Whose chunk it is; None if there is none."""
        page = self._sets.get(key)
        return page.space if page else None

    @contextmanager
    def on_behalf_of(self, space: str) -> Iterator[None]:
        """What is inserted and evicted meanwhile is so for this space."""
        self._space = space
        try:
            yield
        finally:
            self._space = NOBODY

    def get(self, key: OffloadKey) -> ChunkStatus | None:
        return self._chunks.get(key)

    def on_store_miss(self, keys: Iterable[OffloadKey], req_context: ReqContext) -> None:
        """Nothing: they have no place in the order yet."""

    def insert(self, key: OffloadKey, chunk: ChunkStatus) -> None:
        self._chunks[key] = chunk
        self._clock += 1
        self._sets.add(key, Page(self._space, 1, self._clock))

    def remove(self, key: OffloadKey) -> None:
        del self._chunks[key]
        self._sets.remove(key)

    def touch(self, keys: Iterable[OffloadKey], req_context: ReqContext) -> None:
        # A prefix's end goes before its beginning, which other requests share.
        for key in reversed(list(keys)):
            self._clock += 1
            self._sets.touch(key, self._clock)

    def on_request_finished(
        self,
        key_groups: Sequence[Sequence[OffloadKey]],
        insertion_only_keys: set[OffloadKey],
        reused_keys: set[OffloadKey],
        req_context: ReqContext,
    ) -> None:
        self.touch(order_request_keys(key_groups, req_context), req_context)

    def evict(self, n: int, protected: set[OffloadKey]) -> list[tuple[OffloadKey, ChunkStatus]] | None:
        victims: dict[OffloadKey, ChunkStatus] = {}
        for key in self._order(protected) if n else ():
            victims[key] = self._chunks[key]
            if len(victims) == n:
                break
        if len(victims) < n:
            return None
        for key in victims:
            self.remove(key)
        return list(victims.items())

    def _order(self, protected: set[OffloadKey]) -> Iterator[OffloadKey]:
        """What is above the hot sets; then the requester's own, even below its hot set: it is its own to spend. If
        that is not enough the requester has to wait: what others were promised is theirs although it is idle."""

        def may_go(key: OffloadKey) -> bool:
            return self._chunks[key].ref_cnt == 0 and key not in protected

        above: set[OffloadKey] = set()
        for key, _ in self._sets.victims(above_hot_sets=True, may_go=may_go):
            above.add(key)
            yield key
        for key, _ in self._sets.coldest_first(self._space):
            if key not in above and may_go(key):
                yield key

    def clear(self) -> None:
        self._chunks.clear()
        self._sets = self._new_sets()


def hot_sets_of(primary: CPUOffloadingManager) -> HotSetPolicy:
    """The policy of ``primary``, which from now on knows for whom each chunk is stored or promoted.

    vLLM tells a policy which request misses which keys only once a request, however often it then tries to store
    them, and of insertions and evictions nothing at all.
    """
    policy = primary._policy
    assert isinstance(policy, HotSetPolicy)
    prepare = primary.prepare_store

    def prepare_store(keys: Collection[OffloadKey], req_context: ReqContext) -> PrepareStoreOutput | None:
        with policy.on_behalf_of(space_of_request(req_context.kv_transfer_params)):
            return prepare(keys, req_context)

    # Promotions come by the second name, which vLLM bound to the method when it made the tier.
    primary.prepare_store = primary.prepare_write = prepare_store
    return policy
