"""The secondary tier that vLLM's offloading connector loads: ``PageTier``. It hands jobs to ``kvstore.tiers``.

Its methods run in the scheduler's thread and only pass things on: a thread with an event loop reads and writes, two
small pools encode and decode. What is to be written leaves DRAM encoded, within bounds; then the chunk is free again
and the write goes on behind.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.v1.kv_offload.base import (
    LookupResult,
    Medium,
    RequestOffloadingContext,
    get_offload_block_hash,
    get_offload_group_idx,
)
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager

from llmserve.kvstore.codec import Codec, PageKind, encryption_key
from llmserve.kvstore.keys import PageKey
from llmserve.kvstore.notices import Notifier, socket_path
from llmserve.kvstore.quantize import Bytes
from llmserve.kvstore.tiers import Tiers, TierStats
from llmserve.kvstore.transfer.pacing import TokenBucket
from llmserve.workers.offload.known import KnownPages, NamedPage
from llmserve.workers.offload.params import NOBODY, kept_tokens, space_of_request
from llmserve.workers.offload.settings import from_builtins, make_stores, meeting_place

if TYPE_CHECKING:
    from vllm.v1.kv_offload.base import OffloadingSpec, OffloadKey, ReqContext, ScheduleEndContext
    from vllm.v1.kv_offload.tiering.base import TransferJob

logger = logging.getLogger("vllm.llmserve.tiers")

_BACKLOG_BYTES = 256 * 2**20
"""To be written at most; what is more is not kept."""
_PROBE_S = 1.0
_PARALLEL = 4
_FLUSH_S = 0.1
_BURST_S = 0.1
_CLOSE_S = 5.0
STATS = "llmserve_tier"
"""First part of the tier's names in the connector's statistics."""


class PageTier(SecondaryTierManager):  # type: ignore[misc]  # vLLM is untyped
    """All storage classes of the manifest as one tier below DRAM."""

    medium = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: OffloadingSpec,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
        **settings: Any,
    ) -> None:
        """Raises ``KeyProblem`` if the encryption key is not in the environment."""
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        self._settings = from_builtins(settings)
        self._encryption_key = encryption_key(self._settings.encryption, os.environ)
        self._rows: Any = np.frombuffer(primary_kv_view, np.uint8).reshape(primary_kv_view.shape)
        self._fingerprint = ""
        self._known = KnownPages()
        self._news: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        """From the loop's thread, to be called in the scheduler's."""
        self._finished: queue.SimpleQueue[JobResult] = queue.SimpleQueue()
        self._jobs = 0
        self._none_left = threading.Condition()
        self._backlog_bytes = 0
        self._stats = OffloadingConnectorStats()
        self._loading = ThreadPoolExecutor(2, thread_name_prefix="kv-load")
        self._storing = ThreadPoolExecutor(1, thread_name_prefix="kv-store", initializer=_yield_to_the_engine)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="kv-tiers", daemon=True)
        self._tasks: set[asyncio.Task[None]] = set()
        self._open: Tiers | None = None
        self._notifier: Notifier | None = None

    def open(self, fingerprint: str, kind: PageKind) -> None:
        """Begin to serve pages of this kind; before that nothing is found and nothing kept."""
        if self._fingerprint:
            return
        classes = self._settings.classes
        rate = self._settings.io_bytes_s or math.inf
        bucket = TokenBucket(rate, max(rate * _BURST_S, 1.0), time.monotonic())
        self._notifier = notifier = Notifier(socket_path(meeting_place(classes)))
        codec = Codec(kind, self._settings.disk, self._encryption_key)
        self._open = Tiers(
            make_stores(classes), codec, self._loading, storing=self._storing, bucket=bucket, notify=notifier.add
        )
        self._thread.start()
        self._fingerprint = fingerprint
        logger.info("pages of kind %s, %d bytes, kept as %s in %s", fingerprint, kind.page_bytes, codec.disk, classes)

    @property
    def _tiers(self) -> Tiers:
        assert self._open is not None
        return self._open

    # -- lookups ------------------------------------------------------------------------------------------------

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        self._drain()
        space = space_of_request(req_context.kv_transfer_params)
        if space == NOBODY or not self._fingerprint:
            return LookupResult.MISS
        found = self._known.look((space, bytes(key)), req_context.req_id, time.monotonic())
        if found is None:
            return LookupResult.RETRY
        return LookupResult.HIT if found else LookupResult.MISS

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        for pages in self._known.questions():
            self._start(self._probe(pages))
        self._drain()

    async def _probe(self, pages: Sequence[NamedPage]) -> None:
        held = 0
        try:
            async with asyncio.timeout(_PROBE_S):
                held = await self._tiers.held([self._key(page) for page in pages])
        except TimeoutError:
            logger.warning("no answer within %s s which of %d pages there are", _PROBE_S, len(pages))
        except Exception:
            logger.exception("cannot look for pages")
        self._news.put(lambda: self._known.answer(pages, held, time.monotonic()))

    def _drain(self) -> None:
        while not self._news.empty():
            self._news.get()()

    def _key(self, page: NamedPage) -> PageKey:
        space, key = page
        return PageKey(self._fingerprint, space, get_offload_block_hash(key), get_offload_group_idx(key))

    # -- jobs ---------------------------------------------------------------------------------------------------

    def submit_store(self, job_metadata: TransferJob) -> None:
        job = job_metadata
        space = space_of_request(job.req_context.kv_transfer_params)
        kept = kept_tokens(job.req_context.kv_transfer_params)
        items = [
            ((space, bytes(key)), int(chunk))
            for key, chunk in zip(job.keys, job.chunk_ids, strict=True)
            if (space, bytes(key)) not in self._known
            and (job.req_context.get_offload_key_position(key) or kept + 1) > kept
        ]
        self._jobs += 1
        if space == NOBODY or not self._fingerprint or not items:
            self._finish(JobResult(job.job_id, True))
            return
        size_bytes = len(items) * self._block_size_bytes
        if self._backlog_bytes + size_bytes > _BACKLOG_BYTES:
            self._loop.call_soon_threadsafe(self._tiers.drop, len(items))
            self._finish(JobResult(job.job_id, True))
            return
        self._backlog_bytes += size_bytes
        parents = _parents(job.req_context, [key for (_, key), _ in items])
        self._start(self._store(job.job_id, items, parents, size_bytes))

    async def _store(
        self, job_id: int, items: list[tuple[NamedPage, int]], parents: dict[bytes, bytes], size_bytes: int
    ) -> None:
        try:
            begun_s = time.monotonic()
            encoded: list[tuple[NamedPage, bytes]] = []
            try:
                for page, chunk in items:
                    key = self._key(page)
                    if await self._tiers.has(key):
                        self._news.put(lambda page=page: self._known.add(page))  # type: ignore[misc]
                        continue
                    parent = parents.get(page[1], b"")
                    encoded.append((page, await self._tiers.encoded(key, self._row(chunk), parent)))
            finally:
                # The chunks are free again; the rest is behind the engine's back.
                moved = sum(len(data) for _, data in encoded)
                self._finish(JobResult(job_id, True, None, time.monotonic() - begun_s, moved))
            for page, data in encoded:
                if await self._tiers.write(self._key(page), data, parent=parents.get(page[1], b"")):
                    self._news.put(lambda page=page: self._known.add(page))  # type: ignore[misc]
        except Exception:
            logger.exception("cannot keep pages")
        finally:
            self._news.put(lambda: self._written(size_bytes))

    def _written(self, size_bytes: int) -> None:
        self._backlog_bytes -= size_bytes

    def submit_load(self, job_metadata: TransferJob) -> None:
        job = job_metadata
        self._jobs += 1
        space = space_of_request(job.req_context.kv_transfer_params)
        items = [(key, int(chunk)) for key, chunk in zip(job.keys, job.chunk_ids, strict=True)]
        self._start(self._load(job.job_id, space, items))

    async def _load(self, job_id: int, space: str, items: list[tuple[OffloadKey, int]]) -> None:
        begun_s = time.monotonic()
        slots = asyncio.Semaphore(_PARALLEL)

        async def one(key: OffloadKey, chunk: int) -> bool:
            async with slots:
                return await self._tiers.load(self._key((space, bytes(key))), self._row(chunk))

        loaded = await asyncio.gather(*(one(key, chunk) for key, chunk in items), return_exceptions=True)
        for result in loaded:
            if isinstance(result, BaseException):
                logger.error("cannot load a page", exc_info=result)
        found = [key for (key, _), result in zip(items, loaded, strict=True) if result is True]
        lost = [(space, bytes(key)) for (key, _), result in zip(items, loaded, strict=True) if result is not True]
        if lost:
            self._news.put(lambda: self._known.forget(lost))
        moved = len(found) * self._block_size_bytes
        self._finish(JobResult(job_id, len(found) == len(items), found, time.monotonic() - begun_s, moved))

    def _row(self, chunk: int) -> Bytes:
        row: Bytes = self._rows[chunk]
        return row

    def _finish(self, result: JobResult) -> None:
        with self._none_left:
            self._finished.put(result)
            self._none_left.notify_all()

    def get_finished_jobs(self) -> Iterable[JobResult]:
        while not self._finished.empty():
            self._jobs -= 1
            yield self._finished.get()

    def drain_jobs(self) -> None:
        with self._none_left:
            self._none_left.wait_for(lambda: self._finished.qsize() >= self._jobs)

    # -- life ---------------------------------------------------------------------------------------------------

    def get_stats(self) -> OffloadingConnectorStats | None:
        self._drain()
        taken, self._stats = self._stats, OffloadingConnectorStats()
        return taken

    def _count(self, taken: dict[str, TierStats]) -> None:
        for name, stats in taken.items():
            for what in stats.__slots__:
                value = getattr(stats, what)
                if what == "open":
                    self._stats.set_gauge(f"{STATS}:{what}:{name}", value)
                elif value:
                    self._stats.increase_counter(f"{STATS}:{what}:{name}", value)

    def shutdown(self) -> None:
        if self._thread.is_alive():
            closing = asyncio.run_coroutine_threadsafe(self._close(), self._loop)
            try:
                closing.result(_CLOSE_S)
            except Exception:
                logger.exception("the tiers did not close in time")
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_CLOSE_S)
        self._loading.shutdown(wait=True, cancel_futures=True)
        self._storing.shutdown(wait=True, cancel_futures=True)
        # vLLM unmaps the chunks next.
        self._rows = None

    async def _close(self) -> None:
        if self._tasks:
            # What is encoded is still written, if it can be at once.
            _, late = await asyncio.wait(set(self._tasks), timeout=_CLOSE_S / 2)
            for task in late:
                task.cancel()
        await self._tiers.close()
        if self._notifier is not None:
            self._notifier.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        flushing = self._loop.create_task(self._flush())
        self._loop.run_forever()
        flushing.cancel()
        self._loop.run_until_complete(asyncio.gather(flushing, return_exceptions=True))
        self._loop.close()

    async def _flush(self) -> None:
        while True:
            await asyncio.sleep(_FLUSH_S)
            if self._notifier is not None:
                self._notifier.flush()
            taken = self._tiers.take_stats()
            self._news.put(lambda taken=taken: self._count(taken))  # type: ignore[misc]

    def _start(self, job: Coroutine[Any, Any, None]) -> None:
        self._loop.call_soon_threadsafe(self._begin, job)

    def _begin(self, job: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(job)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _parents(context: ReqContext, keys: Collection[bytes]) -> dict[bytes, bytes]:
    """Block hash of the page before each of ``keys`` in the request's prefix, where it is known."""
    positions: dict[bytes, int] = getattr(context, "_offload_key_positions", {})
    wanted = set(keys)
    before: dict[int, bytes] = {}
    found: dict[bytes, bytes] = {}
    for key in sorted(positions, key=positions.__getitem__):
        group = get_offload_group_idx(key)
        if bytes(key) in wanted and group in before:
            found[bytes(key)] = before[group]
        before[group] = get_offload_block_hash(key)
    return found


def _yield_to_the_engine() -> None:
    # Linux keeps priorities by thread: what is written behind must not slow down what is computed.
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
