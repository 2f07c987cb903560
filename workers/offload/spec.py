"""vLLM's tiering, made to run on its CPU backend too, and told of hot sets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.platforms import current_platform
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.manager import TieringOffloadingManager
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from llmserve.workers.offload.copying import CopyingWorker
from llmserve.workers.offload.params import HOT_BYTES
from llmserve.workers.offload.policy import hot_sets_of

if TYPE_CHECKING:
    from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingManager, OffloadingWorker


class PageTieringSpec(TieringOffloadingSpec):  # type: ignore[misc]  # vLLM is untyped
    """DRAM, and below it ``PageTier``."""

    _worker: OffloadingWorker | None

    def get_manager(self) -> OffloadingManager:
        if self._manager is None:
            manager = super().get_manager()
            assert isinstance(manager, TieringOffloadingManager)
            hot_bytes: dict[str, float] = self.extra_config.get(HOT_BYTES, {})
            hot_chunks = {space: size / self.kv_bytes_per_chunk for space, size in hot_bytes.items()}
            hot_sets_of(manager.primary_tier).promise(hot_chunks)
        return self._manager

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if not current_platform.is_cpu():
            return super().get_worker(kv_caches)
        if self._worker is None:
            region = SharedOffloadRegion(
                engine_id=self._engine_id,
                num_chunks=self.num_chunks,
                rank=self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            self._worker = CopyingWorker(kv_caches, region)
        return self._worker
