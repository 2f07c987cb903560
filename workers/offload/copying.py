"""Between the engine's memory and DRAM on the CPU backend, which vLLM's own worker refuses: copies in a thread."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult

if TYPE_CHECKING:
    import numpy.typing as npt
    from vllm.v1.kv_offload.base import CanonicalKVCaches, GPULoadStoreSpec
    from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
    from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion


class CopyingWorker(OffloadingWorker):  # type: ignore[misc]  # vLLM is untyped
    """One rank's copies, in the order in which they are submitted."""

    def __init__(self, caches: CanonicalKVCaches, region: SharedOffloadRegion) -> None:
        self._region = region
        self._pages = [tensor.tensor for tensor in caches.tensors]
        """Each of shape (blocks, bytes)."""
        self._rows = [region.create_next_worker_view(tensor.page_size_bytes) for tensor in caches.tensors]
        self._groups = caches.group_data_refs
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kv-copy")
        self._done: queue.SimpleQueue[TransferResult] = queue.SimpleQueue()
        self._running: dict[int, Future[None]] = {}

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: CPULoadStoreSpec) -> bool:
        def copy(page: torch.Tensor, row: torch.Tensor, blocks: torch.Tensor, chunks: torch.Tensor) -> None:
            row[chunks] = page[blocks]

        self._submit(job_id, src_spec, dst_spec, copy)
        return True

    def submit_load(self, job_id: int, src_spec: CPULoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        def copy(page: torch.Tensor, row: torch.Tensor, blocks: torch.Tensor, chunks: torch.Tensor) -> None:
            page[blocks] = row[chunks]

        self._submit(job_id, dst_spec, src_spec, copy)
        return True

    def _submit(
        self,
        job_id: int,
        engine: GPULoadStoreSpec,
        dram: CPULoadStoreSpec,
        copy: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None],
    ) -> None:
        blocks, chunks, sizes = engine.block_ids, dram.block_ids, list(engine.group_sizes)
        self._running[job_id] = self._thread.submit(self._copy, job_id, blocks, chunks, sizes, copy)

    def _copy(
        self,
        job_id: int,
        blocks: npt.NDArray[np.int32],
        chunks: npt.NDArray[np.int32],
        sizes: list[int],
        copy: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None],
    ) -> None:
        begun_s, moved, start = time.perf_counter(), 0, 0
        for refs, size in zip(self._groups, sizes, strict=True):
            here = torch.from_numpy(blocks[start : start + size].astype(np.int64))
            there = torch.from_numpy(chunks[start : start + size].astype(np.int64))
            start += size
            for ref in refs if size else ():
                copy(self._pages[ref.tensor_idx], self._rows[ref.tensor_idx], here, there)
                moved += size * ref.page_size_bytes
        self._done.put(TransferResult(job_id, True, moved, time.perf_counter() - begun_s))

    def get_finished(self) -> list[TransferResult]:
        finished: list[TransferResult] = []
        while not self._done.empty():
            result = self._done.get()
            self._running.pop(result.job_id).result()
            finished.append(result)
        for running in self._running.values():
            if running.done() and (error := running.exception()) is not None:
                raise error
        return finished

    def wait(self, job_ids: set[int]) -> None:
        for job_id in job_ids:
            if job_id in self._running:
                self._running[job_id].result()

    def shutdown(self) -> None:
        self._thread.shutdown(wait=True)
        self._pages.clear()
        self._rows.clear()
        self._region.cleanup()
