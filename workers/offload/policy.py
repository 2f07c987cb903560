"""The DRAM tier's order of eviction: ``kvstore.hotset`` behind vLLM's interface."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from vllm.v1.kv_offload.cpu.policies.base import CachePolicy, ChunkStatus, order_request_keys

from llmserve.kvstore.hotset import HotSets, Page
from llmserve.workers.offload.params import NOBODY, space_of_request

if TYPE_CHECKING:
    from vllm.v1.kv_offload.base import OffloadKey, ReqContext


class HotSetPolicy(CachePolicy):  # type: ignore[misc]  # vLLM is untyped
    """Chunks of DRAM by space; a space keeps its hot set whatever the others do."""

    def __init__(self, cache_capacity: int) -> None:
        super().__init__(cache_capacity)
        self._chunks: dict[OffloadKey, ChunkStatus] = {}
        self._hot_chunks: Mapping[str, float] = {}
        self._sets: HotSets[OffloadKey] = HotSets(cache_capacity, {})
        self._owners: dict[OffloadKey, str] = {}
        """Of chunks that are about to be inserted."""
        self._clock = 0

    def promise(self, hot_chunks: Mapping[str, float]) -> None:
        """Hot sets in chunks by space, before the first insertion: vLLM makes the policy with a capacity only."""
        assert not self._chunks
        self._hot_chunks = hot_chunks
        self._sets = HotSets(self.cache_capacity, hot_chunks)

    def get(self, key: OffloadKey) -> ChunkStatus | None:
        return self._chunks.get(key)

    def on_store_miss(self, keys: Iterable[OffloadKey], req_context: ReqContext) -> None:
        # vLLM says so right before it inserts the same keys.
        self._owners = dict.fromkeys(keys, space_of_request(req_context.kv_transfer_params))

    def insert(self, key: OffloadKey, chunk: ChunkStatus) -> None:
        self._chunks[key] = chunk
        self._clock += 1
        self._sets.add(key, Page(self._owners.pop(key, NOBODY), 1, self._clock))

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
        victims: list[tuple[OffloadKey, ChunkStatus]] = []
        if n:
            for key, _ in self._sets.victims(
                may_go=lambda key: self._chunks[key].ref_cnt == 0 and key not in protected
            ):
                victims.append((key, self._chunks[key]))
                if len(victims) == n:
                    break
        if len(victims) < n:
            return None
        for key, _ in victims:
            self.remove(key)
        return victims

    def clear(self) -> None:
        self._chunks.clear()
        self._owners.clear()
        self._sets = HotSets(self.cache_capacity, self._hot_chunks)
