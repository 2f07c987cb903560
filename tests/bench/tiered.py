"""A simulated engine whose tiers are real: pages of bytes in DRAM, and below it in a folder, by ``kvstore.tiers``.

Only computing is simulated. A page's bytes follow from its name. They are copied to DRAM when the engine's own memory
is needed, encoded and written behind its back when they are computed, and looked for, read, decoded and compared,
byte by byte, when a prompt begins like one before it.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from llmserve.bus.block_hashes import SHORT_BYTES, short_hashes, unpack_short
from llmserve.bus.cache_salt import request_salt
from llmserve.kvstore.codec import Codec, PageKind
from llmserve.kvstore.keys import PageKey, space_of
from llmserve.kvstore.notices import Notifier, socket_path
from llmserve.kvstore.priority import keep_to_one_core, yield_on_one_core
from llmserve.kvstore.quantize import Bytes
from llmserve.kvstore.tiers import Tiers
from llmserve.kvstore.transfer.pacing import TokenBucket
from llmserve.manifests.schema import StorageClass
from llmserve.workers.engine.base import EngineInfo, EngineLoad, Work
from llmserve.workers.engine.load_rates import LoadRates
from llmserve.workers.engine.simulated import SimulatedEngine, SimulatedSettings
from llmserve.workers.engine.simulated_pages import PagePool
from llmserve.workers.engine.wire import decode_body
from llmserve.workers.offload.settings import make_stores, meeting_place
from llmserve.workers.offload.writing import Outgoing, WriteBehind

_FLUSH_S = 0.1
_WAITING_BYTES = 256 * 2**20
_PARALLEL = 4
_BACKLOG = 0.25
"""Of DRAM that may be on its way to the folder; of what is more the end of each prefix is not kept. All as in
``PageTier``."""


class TieredPool(PagePool):
    """Pages below are bytes: in ``rows`` those of DRAM."""

    def __init__(self, pages: int, dram_pages: int, page_bytes: int) -> None:
        super().__init__(pages, dram_pages)
        self.rows: dict[int, Bytes] = {}
        """In the order of ``_dram``."""
        self.on_disk: set[int] = set()
        """What was found or written there."""
        self.computed: list[int] = []
        """Named since the last step, and not known to be below."""
        self.loaded: list[int] = []
        """Named since the last step, whose bytes are in DRAM."""
        self._ground = np.random.default_rng(0).integers(0, 255, page_bytes).astype(np.uint8)

    def bytes_of(self, number: int) -> Bytes:
        """What the engine has computed for this page."""
        page = self._ground.copy()
        page[:SHORT_BYTES] = np.frombuffer(number.to_bytes(SHORT_BYTES, "big"), np.uint8)
        return page

    def name(self, number: int) -> bool:
        new = super().name(number)
        if new and number in self._dram:
            self.loaded.append(number)
        elif new and number not in self.on_disk:
            self.computed.append(number)
        return new

    def put(self, number: int, page: Bytes) -> None:
        """Into DRAM."""
        super()._demote(number)
        self.rows.pop(number, None)
        if self.dram_pages:
            self.rows[number] = page
        if len(self.rows) > self.dram_pages:
            del self.rows[next(iter(self.rows))]

    def _demote(self, number: int) -> None:
        self.put(number, self.bytes_of(number))


class TieredEngine(SimulatedEngine):
    """For prompts of one tenant."""

    def __init__(self, settings: SimulatedSettings, folder: StorageClass, tenant: str) -> None:
        super().__init__(settings)
        limits = settings.limits
        self._pool = TieredPool(limits.pages, limits.dram_pages, settings.page_bytes)
        self.scheduler.pool = self._pool
        self._storage = folder
        self._space = space_of(tenant, {})
        self._rates = LoadRates([folder])
        self._loading = ThreadPoolExecutor(2, initializer=keep_to_one_core)
        self._storing = ThreadPoolExecutor(1, initializer=yield_on_one_core)
        self._backlog = int(limits.dram_pages * _BACKLOG)
        self._behind = 0
        """Pages that are being written."""
        self._jobs: set[asyncio.Task[None]] = set()
        self.dropped = self.loaded = 0
        """Pages that were not written; that were read from the folder."""

    async def start(self) -> EngineInfo:
        self._notifier = Notifier(socket_path(meeting_place((self._storage,))))
        self._tiers = Tiers(
            make_stores((self._storage,), threads=_PARALLEL),
            Codec(PageKind("bf16", self.settings.page_bytes, 64), "zstd"),
            self._loading,
            storing=self._storing,
            bucket=TokenBucket(math.inf, 1.0, time.monotonic()),
            notify=self._notifier.add,
        )
        self._writing = WriteBehind(self._tiers, _WAITING_BYTES, _PARALLEL)
        self._begin(self._flush())
        return await super().start()

    def submit(self, work: Work) -> None:
        self._begin(self._look(work))

    async def _look(self, work: Work) -> None:
        """Bring what the folder has of the prompt to DRAM before the work is queued; others go on meanwhile, as with
        vLLM's offloading."""
        body, page_tokens = decode_body(work.body), self.settings.limits.page_tokens
        salt = request_salt(work.owner_salt, body.cache_salt)
        hashes = unpack_short(short_hashes(body.prompt, page_tokens, salt))[: (len(body.prompt) - 1) // page_tokens]
        here = self._pool.known(hashes)
        here += self._pool.loadable(hashes[here:])
        if here < len(hashes):
            compute_s = page_tokens / work.compute_tokens_s if work.compute_tokens_s else math.inf
            more = await self._tiers.held([self._key(number) for number in hashes[here:]], compute_s)
            await asyncio.gather(*(self._bring(number) for number in hashes[here : here + more]))
        super().submit(work)

    async def _bring(self, number: int) -> None:
        page = np.empty(self.settings.page_bytes, np.uint8)
        if not await self._tiers.load(self._key(number), page):
            raise AssertionError(f"page {number:x} was there and cannot be loaded")
        self._pool.on_disk.add(number)
        self._pool.put(number, page)

    async def _pass_time(self, seconds: float) -> None:
        loaded, self._pool.loaded = self._pool.loaded, []
        for number in loaded:
            page = self._pool.rows.get(number)
            same = page is None or np.array_equal(page, self._pool.bytes_of(number))
            assert same, f"page {number:x} is another"
        await super()._pass_time(seconds)
        computed, self._pool.computed = self._pool.computed, []
        room = max(0, self._backlog - self._behind)
        self.dropped += len(computed[room:])
        if computed[:room]:
            self._begin(self._keep(computed[:room]))

    async def _keep(self, numbers: Sequence[int]) -> None:
        self._behind += len(numbers)
        pages = [Outgoing(self._key(number), b"", self._pool.bytes_of(number)) for number in numbers]
        kept = await self._writing.keep(pages, encoded=lambda moved: None)
        self._behind -= len(numbers)
        self._pool.on_disk.update(number for number, there in zip(numbers, kept, strict=True) if there)

    def _key(self, number: int) -> PageKey:
        return PageKey(self._fingerprint, self._space, number.to_bytes(SHORT_BYTES, "big"))

    async def _flush(self) -> None:
        while True:
            self._notifier.flush()
            for name, stats in self._tiers.take_stats().items():
                self.loaded += stats.loads
                counts = {"loads": float(stats.loads), "load_s": stats.load_s}
                self._rates.saw({name: counts}, self.settings.limits.page_tokens)
            await asyncio.sleep(_FLUSH_S)

    def load(self) -> EngineLoad:
        return replace(super().load(), load_tokens_s=dict(self._rates.tokens_s))

    def _begin(self, job: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(job)
        self._jobs.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._jobs.discard(task)
        if not task.cancelled():
            task.result()

    async def close(self) -> None:
        for task in self._jobs:
            task.cancel()
        await asyncio.gather(*self._jobs, return_exceptions=True)
        await self._tiers.close()
        self._notifier.close()
        self._loading.shutdown()
        self._storing.shutdown()
        await super().close()
