"""Between the engine's memory and DRAM on the CPU backend, which vLLM's own worker refuses: copies in a thread.

Nothing here may be torch's: of a thread that uses it in parallel, OpenMP keeps a team of threads for ever, and with
more threads than cores those of the engine sleep between operations instead of waiting for the next one (libgomp's
throttled spinning), which cost a decode engine on two cores a seventh of its tokens.
"""

from __future__ import annotations

import queue
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from vllm.v1.kv_offload.base import CanonicalKVCaches, GPULoadStoreSpec
    from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
    from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion


class CopyingWorker(OffloadingWorker):  # type: ignore[misc]  # vLLM is untyped
    """One rank's copies, in the order in which they are submitted."""

    def __init__(self, caches: CanonicalKVCaches, region: SharedOffloadRegion) -> None:
        self._region = region
        self._pages = [_bytes(tensor.tensor) for tensor in caches.tensors]
        """Each of shape (blocks, bytes)."""
        self._rows = [_bytes(region.create_next_worker_view(tensor.page_size_bytes)) for tensor in caches.tensors]
        self._groups = caches.group_data_refs
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kv-copy")
        self._done: queue.SimpleQueue[TransferResult] = queue.SimpleQueue()
        self._running: dict[int, Future[None]] = {}

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: CPULoadStoreSpec) -> bool:
        self._submit(job_id, src_spec, dst_spec, storing=True)
        return True

    def submit_load(self, job_id: int, src_spec: CPULoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        self._submit(job_id, dst_spec, src_spec, storing=False)
        return True

    def _submit(self, job_id: int, engine: GPULoadStoreSpec, dram: CPULoadStoreSpec, *, storing: bool) -> None:
        blocks, chunks, sizes = engine.block_ids.tolist(), dram.block_ids.tolist(), list(engine.group_sizes)
        self._running[job_id] = self._thread.submit(self._copy, job_id, blocks, chunks, sizes, storing)

    def _copy(self, job_id: int, blocks: list[int], chunks: list[int], sizes: list[int], storing: bool) -> None:
        begun_s, moved, start = time.perf_counter(), 0, 0
        for refs, size in zip(self._groups, sizes, strict=True):
            places = list(zip(blocks[start : start + size], chunks[start : start + size], strict=True))
            start += size
            for ref in refs:
                pages, rows = self._pages[ref.tensor_idx], self._rows[ref.tensor_idx]
                for block, chunk in places:
                    if storing:
                        rows[chunk] = pages[block]
                    else:
                        pages[block] = rows[chunk]
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


def _bytes(tensor: torch.Tensor) -> npt.NDArray[np.int8]:
    """The same memory."""
    array: npt.NDArray[np.int8] = tensor.numpy()
    return array
