"""An engine without a model: the batching, paging, handoff and timing of one, and token ids that mean nothing.

For tests of scale and of scheduling only: nothing that it outputs is text of any model. It reads the same requests
as vLLM's engine, and the same request always yields the same tokens, on one worker or over a handoff, in one attempt
or several, since each token is a function of all tokens before it. Its prefix cache names pages as vLLM's does, and
tells of them.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import secrets
import time
from dataclasses import dataclass

import msgspec

from llmserve.bus.cache_salt import request_salt
from llmserve.bus.messages import KvChange, Reason
from llmserve.workers.engine.base import (
    Engine,
    EngineError,
    EngineInfo,
    EngineLoad,
    EngineOutput,
    Step,
    Transfer,
    Work,
)
from llmserve.workers.engine.simulated_batch import Scheduler
from llmserve.workers.engine.simulated_link import PageOwner, PageReader, PeerGone
from llmserve.workers.engine.simulated_sequence import Batch, Limits, Phase, Sequence
from llmserve.workers.engine.wire import API, decode_body

logger = logging.getLogger("llmserve.simulated")


@dataclass(frozen=True, slots=True)
class Timing:
    """A step takes ``step_s`` plus the cost of what it computes."""

    step_s: float = 0.005
    prefill_s_per_token: float = 20e-6
    decode_s_per_request: float = 50e-6
    transfer_bits_per_s: float = 100e9
    load_s_per_page: float = 0.0
    """From the tier in DRAM."""

    def step_seconds(self, batch: Batch) -> float:
        return (
            self.step_s
            + batch.prefill_tokens * self.prefill_s_per_token
            + batch.decodes * self.decode_s_per_request
            + batch.loaded_pages * self.load_s_per_page
        )


@dataclass(frozen=True, slots=True)
class SimulatedSettings:
    limits: Limits
    timing: Timing = Timing()
    page_bytes: int = 368_640
    """Default: 16 tokens of SmolLM2-135M in 16 bits."""
    lease_s: float = 30.0
    transfer_timeout_s: float = 10.0
    host: str = "127.0.0.1"
    """Address on which decode engines reach this one."""
    model: str = "simulated"


class HandoffParams(msgspec.Struct, frozen=True, array_like=True):
    """Content of ``EngineOutput.handoff``."""

    fingerprint: str
    host: str
    port: int
    key: str
    """Unguessable name of the held pages at their owner."""
    pages: int
    cached_tokens: int


class SimulatedEngine(Engine):
    """See the module. ``scheduler`` may be inspected by tests."""

    def __init__(self, settings: SimulatedSettings) -> None:
        self.settings = settings
        self.scheduler = Scheduler(settings.limits)
        self._fingerprint = f"simulated-{settings.model}-{settings.limits.page_tokens}x{settings.page_bytes}"
        self._owner = PageOwner(self._take)
        self._reader = PageReader()
        self._address = ("", 0)
        self._keys: dict[str, str] = {}
        self._leases: list[tuple[float, str]] = []
        self._loads: set[asyncio.Task[None]] = set()
        self._link_free_s = 0.0
        self._step_due_s = 0.0
        self._outputs: list[EngineOutput] = []
        self._released: list[str] = []
        self._transfers: list[Transfer] = []
        self._steps_ended = 0
        self._wake = asyncio.Event()

    async def start(self) -> EngineInfo:
        try:
            self._address = await self._owner.open(self.settings.host)
        except OSError as error:
            raise EngineError(f"simulated engine cannot listen on {self.settings.host}: {error}") from error
        limits = self.settings.limits
        return EngineInfo(
            api=API,
            fingerprint=self._fingerprint,
            max_model_len=limits.max_model_len,
            slots=limits.slots,
            step_tokens=limits.step_tokens,
            pages_total=limits.pages,
            page_tokens=limits.page_tokens,
            page_bytes=self.settings.page_bytes,
        )

    def submit(self, work: Work) -> None:
        if work.ahead:
            # Its pages arrive as fast as they are asked for.
            return
        body = decode_body(work.body)
        salt = request_salt(work.owner_salt, body.cache_salt) if work.owner_salt else body.cache_salt or ""
        self.scheduler.add(work.work_id, work.stage, body, work.first_tokens, work.handoff, salt)
        self._wake.set()

    def abort(self, work_ids: list[str]) -> None:
        for work_id in work_ids:
            phase = self.scheduler.abort(work_id)
            if phase is Phase.HELD:
                self._released.append(work_id)
            elif phase is not None:
                self._outputs.append(EngineOutput(work_id=work_id, tokens=[], reason=Reason.CANCELLED))
        self._wake.set()

    async def step(self) -> Step:
        while True:
            self._expire(time.monotonic())
            batch = self.scheduler.schedule()
            for sequence in batch.loads:
                self._start_load(sequence)
            if batch.items:
                await self._pass_time(self.settings.timing.step_seconds(batch))
                self._steps_ended += 1
                for output in self.scheduler.complete(batch):
                    self._outputs.append(self._with_handoff(output))
            elif not self._has_news():
                await self._sleep_until_woken()
            kv = self.scheduler.pool.changes()
            if self._has_news() or batch.prefill_tokens or kv:
                return self._take_news(batch.prefill_tokens, kv)

    def load(self) -> EngineLoad:
        scheduler = self.scheduler
        return EngineLoad(
            running=len(scheduler.running) + scheduler.loading,
            waiting=len(scheduler.waiting),
            pages_free=scheduler.pages_free,
            steps=self._steps_ended,
        )

    async def close(self) -> None:
        for task in self._loads:
            task.cancel()
        self._reader.close()
        await self._owner.close()

    async def _pass_time(self, seconds: float) -> None:
        """Sleep so that steps follow each other at the modelled pace, without adding up the timer's lateness."""
        now = time.monotonic()
        self._step_due_s = max(now - 0.010, self._step_due_s) + seconds
        await asyncio.sleep(max(0.0, self._step_due_s - now))

    async def _sleep_until_woken(self) -> None:
        self._wake.clear()
        timeout = self._leases[0][0] - time.monotonic() if self._leases else None
        try:
            async with asyncio.timeout(timeout):
                await self._wake.wait()
        except TimeoutError:
            return

    def _has_news(self) -> bool:
        return bool(self._outputs or self._released or self._transfers)

    def _take_news(self, prefill_tokens: int, kv: list[KvChange]) -> Step:
        step = Step(self._outputs, self._released, self._transfers, prefill_tokens=prefill_tokens, kv=kv)
        self._outputs, self._released, self._transfers = [], [], []
        return step

    # -- the producer's side of a handoff

    def _with_handoff(self, output: EngineOutput) -> EngineOutput:
        sequence = self.scheduler.sequences.get(output.work_id)
        if sequence is None or sequence.phase is not Phase.HELD:
            return output
        key = secrets.token_hex(16)
        self._keys[key] = output.work_id
        heapq.heappush(self._leases, (time.monotonic() + self.settings.lease_s, key))
        host, port = self._address
        params = HandoffParams(self._fingerprint, host, port, key, sequence.pages, sequence.cached)
        return EngineOutput(
            work_id=output.work_id,
            tokens=output.tokens,
            cached_tokens=output.cached_tokens,
            loaded_tokens=output.loaded_tokens,
            computed_tokens=output.computed_tokens,
            handoff=msgspec.msgpack.encode(params),
            pages=sequence.pages,
        )

    def _take(self, key: str) -> bool:
        """Release the pages of ``key``: read, or their lease is over."""
        work_id = self._keys.pop(key, None)
        if work_id is None or not self.scheduler.release(work_id):
            return False
        self._released.append(work_id)
        self._wake.set()
        return True

    def _expire(self, now_s: float) -> None:
        while self._leases and self._leases[0][0] <= now_s:
            _, key = heapq.heappop(self._leases)
            if self._take(key):
                logger.info("lease of handed-off pages expired unread")

    # -- the consumer's side

    def _start_load(self, sequence: Sequence) -> None:
        task = asyncio.create_task(self._load(sequence))
        self._loads.add(task)
        task.add_done_callback(self._loads.discard)

    async def _load(self, sequence: Sequence) -> None:
        started_s = time.monotonic()
        pages = cached = 0
        failure = ""
        try:
            params = msgspec.msgpack.decode(sequence.handoff, type=HandoffParams)
            here = len(sequence.names.shared) if sequence.names is not None else 0
            pages, cached = max(0, params.pages - here), params.cached_tokens
            async with asyncio.timeout(self.settings.transfer_timeout_s):
                failure = await self._transfer(params, pages)
        except msgspec.MsgspecError:
            failure = "other"
        except PeerGone:
            failure = "peer"
        except TimeoutError:
            failure = "timeout"
        if failure:
            logger.warning("handoff of %s failed (%s): computing its prompt here", sequence.work_id, failure)
        moved = 0 if failure else pages * self.settings.page_bytes
        seconds = time.monotonic() - started_s
        self._transfers.append(Transfer("simulated", "pull", moved, seconds, failure, sequence.work_id))
        self.scheduler.loaded(sequence, ok=not failure, cached=cached)
        self._wake.set()

    async def _transfer(self, params: HandoffParams, pages: int) -> str:
        """Let the transfer's time pass on this engine's one link, then ask whether the pages were valid so long."""
        if params.fingerprint != self._fingerprint:
            return "fingerprint"
        now = time.monotonic()
        seconds = pages * self.settings.page_bytes * 8 / self.settings.timing.transfer_bits_per_s
        self._link_free_s = max(now, self._link_free_s) + seconds
        await asyncio.sleep(self._link_free_s - now)
        return "" if await self._reader.take((params.host, params.port), params.key) else "stale"
