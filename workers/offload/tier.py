"""The secondary tier that vLLM's offloading connector loads: ``PageTier``. It hands jobs to ``kvstore.tiers``.

Its methods run in the scheduler's thread and only pass things on: a thread with an event loop reads and writes, two
pools encode and decode. What is to be written leaves DRAM encoded, within bounds; then the chunk is free again and
the write goes on behind.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
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
from llmserve.kvstore.priority import keep_to_one_core, yield_on_one_core
from llmserve.kvstore.quantize import Bytes
from llmserve.kvstore.tiers import Tiers, TierStats
from llmserve.kvstore.transfer.pacing import TokenBucket
from llmserve.workers.offload.known import KnownPages, NamedPage
from llmserve.workers.offload.loading import Incoming, load_all
from llmserve.workers.offload.loop import LoopThread
from llmserve.workers.offload.params import NOBODY, kept_tokens, page_compute_s, space_of_request
from llmserve.workers.offload.settings import from_builtins, make_stores, meeting_place
from llmserve.workers.offload.writing import Outgoing, WriteBehind, parents_of

if TYPE_CHECKING:
    from vllm.v1.kv_offload.base import OffloadingSpec, OffloadKey, ReqContext, ScheduleEndContext
    from vllm.v1.kv_offload.tiering.base import TransferJob

logger = logging.getLogger("vllm.llmserve.tiers")

_WAITING_BYTES = 256 * 2**20
"""Encoded and not written yet, at most."""
_BACKLOG = 0.25
"""Part of DRAM that may wait to be written; what is more is not kept."""
_FLUSH_S = 0.1
_BURST_S = 0.1
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
        self._page_tokens = 0
        self._compute_s = math.inf
        """In which the engine computes a page, as the last request said."""
        self._known = KnownPages()
        self._news: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        """From the loop's thread, to be called in the scheduler's."""
        self._finished: queue.SimpleQueue[JobResult] = queue.SimpleQueue()
        self._jobs = 0
        self._none_left = threading.Condition()
        self._backlog = max(1, int(len(self._rows) * _BACKLOG))
        self._behind = 0
        """Pages that are being written."""
        self._stats = OffloadingConnectorStats()
        cores = len(os.sched_getaffinity(0))
        self._parallel = max(4, cores)
        self._loading = ThreadPoolExecutor(
            max(2, cores // 2), thread_name_prefix="kv-load", initializer=keep_to_one_core
        )
        self._storing = ThreadPoolExecutor(
            max(1, cores // 8), thread_name_prefix="kv-store", initializer=yield_on_one_core
        )
        self._thread = LoopThread("kv-tiers")
        self._open: tuple[Tiers, WriteBehind] | None = None
        self._notifier: Notifier | None = None

    def open(self, fingerprint: str, kind: PageKind, page_tokens: int) -> None:
        """Begin to serve pages of this kind; before that nothing is found and nothing kept."""
        if self._fingerprint:
            return
        classes = self._settings.classes
        rate = self._settings.io_bytes_s or math.inf
        bucket = TokenBucket(rate, max(rate * _BURST_S, 1.0), time.monotonic())
        self._notifier = notifier = Notifier(socket_path(meeting_place(classes)))
        codec = Codec(kind, self._settings.disk, self._encryption_key)
        tiers = Tiers(
            make_stores(classes, threads=self._parallel),
            codec,
            self._loading,
            storing=self._storing,
            bucket=bucket,
            notify=notifier.add,
        )
        self._open = tiers, WriteBehind(tiers, _WAITING_BYTES, self._parallel)
        self._thread.start()
        self._thread.every(_FLUSH_S, self._flush)
        self._fingerprint, self._page_tokens = fingerprint, page_tokens
        logger.info("pages of kind %s, %d bytes, kept as %s in %s", fingerprint, kind.page_bytes, codec.disk, classes)

    @property
    def _tiers(self) -> Tiers:
        assert self._open is not None
        return self._open[0]

    # -- lookups ------------------------------------------------------------------------------------------------

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        self._drain()
        space = space_of_request(req_context.kv_transfer_params)
        if space == NOBODY or not self._fingerprint:
            return LookupResult.MISS
        compute_s = page_compute_s(req_context.kv_transfer_params, self._page_tokens)
        if not self._tiers.worthy(compute_s):
            return LookupResult.MISS
        self._compute_s = compute_s
        found = self._known.look((space, bytes(key)), req_context.req_id, time.monotonic())
        if found is None:
            return LookupResult.RETRY
        return LookupResult.HIT if found else LookupResult.MISS

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        for pages in self._known.questions():
            self._thread.begin(self._probe(pages))
        self._drain()

    async def _probe(self, pages: Sequence[NamedPage]) -> None:
        held = 0
        try:
            held = await self._tiers.held([self._key(page) for page in pages], self._compute_s)
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
        self._drain()  # what has been written since the last step makes room
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
        # The first pages of a prefix are worth more than its last ones.
        room = max(0, self._backlog - self._behind)
        if dropped := len(items[room:]):
            self._thread.call(self._tiers.drop, dropped)
        items = items[:room]
        self._behind += len(items)
        parents = parents_of(job.req_context, [key for (_, key), _ in items])
        outgoing = [
            Outgoing(self._key(page), parents.get(page[1], b""), self._row(chunk), anew=self._known.is_lost(page))
            for page, chunk in items
        ]
        self._thread.begin(self._store(job.job_id, [page for page, _ in items], outgoing))

    async def _store(self, job_id: int, pages: list[NamedPage], outgoing: list[Outgoing]) -> None:
        begun_s = time.monotonic()

        def encoded(moved: int) -> None:
            # The chunks are free again; the rest is behind the engine's back.
            self._finish(JobResult(job_id, True, None, time.monotonic() - begun_s, moved))

        kept: list[bool] = []
        try:
            assert self._open is not None
            kept = await self._open[1].keep(outgoing, encoded)
        except Exception:
            logger.exception("cannot keep pages")
        finally:
            there = [page for page, done in zip(pages, kept, strict=False) if done]
            self._news.put(lambda: self._written(len(pages), there))

    def _written(self, count: int, there: list[NamedPage]) -> None:
        self._behind -= count
        for page in there:
            self._known.written(page)

    def submit_load(self, job_metadata: TransferJob) -> None:
        self._jobs += 1
        compute_s = page_compute_s(job_metadata.req_context.kv_transfer_params, self._page_tokens)
        self._thread.begin(self._load(job_metadata, compute_s))

    async def _load(self, job: TransferJob, compute_s: float) -> None:
        begun_s = time.monotonic()
        space = space_of_request(job.req_context.kv_transfer_params)
        pages = [(space, bytes(key)) for key in job.keys]
        rows = [self._row(int(chunk)) for chunk in job.chunk_ids]
        incoming = [Incoming(self._key(page), row) for page, row in zip(pages, rows, strict=True)]
        loaded = await load_all(self._tiers, incoming, compute_s, self._parallel)
        found = [key for key, done in zip(job.keys, loaded, strict=True) if done]
        lost = [page for page, done in zip(pages, loaded, strict=True) if not done]
        if lost:
            self._news.put(lambda: self._known.lost(lost, time.monotonic()))
        moved = len(found) * self._block_size_bytes
        self._finish(JobResult(job.job_id, not lost, found, time.monotonic() - begun_s, moved))

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
        self._thread.stop(self._close)
        self._loading.shutdown(wait=True, cancel_futures=True)
        self._storing.shutdown(wait=True, cancel_futures=True)
        # vLLM unmaps the chunks next.
        self._rows = None

    async def _close(self) -> None:
        await self._tiers.close()
        if self._notifier is not None:
            self._notifier.close()

    def _flush(self) -> None:
        if self._notifier is not None:
            self._notifier.flush()
        taken = self._tiers.take_stats()
        self._news.put(lambda: self._count(taken))
