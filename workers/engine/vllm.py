"""``VllmEngine``: one vLLM engine core, tokens only."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
import uuid
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from llmserve.bus.messages import Reason, Role
from llmserve.manifests.schema import Manifest
from llmserve.manifests.sizes import dram_bytes
from llmserve.workers.engine import shm
from llmserve.workers.engine.base import (
    Engine,
    EngineDied,
    EngineError,
    EngineInfo,
    EngineLoad,
    EngineOutput,
    Offer,
    Step,
    Work,
)
from llmserve.workers.engine.load_rates import LoadRates
from llmserve.workers.engine.sockets import socket_folder
from llmserve.workers.engine.vllm_ahead import Ahead
from llmserve.workers.engine.vllm_config import VllmOptions, apply_environment, build_config
from llmserve.workers.engine.vllm_core import Core, Unheard, info_of
from llmserve.workers.engine.vllm_events import changes_of
from llmserve.workers.engine.vllm_outputs import (
    Entry,
    OutputReader,
    load_of,
    offers_of,
    released_of,
    spoilt_of,
    tiers_of,
    transfers_of,
)
from llmserve.workers.engine.vllm_process import ProcessCore
from llmserve.workers.engine.vllm_requests import Limits, RequestStager, release_request
from llmserve.workers.engine.vllm_thread import ThreadCore

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVEventBatch
    from vllm.v1.engine import EngineCoreOutputs

logger = logging.getLogger(__name__)

_ABORTED_KEPT = 4096
"""Aborted requests whose late outputs are still recognised."""
_ASK_IDLE_S = 1.0  # as often as a heartbeat
_RELEASE_S = 1.0  # for a core that is to end to free what it holds


class VllmEngine(Engine):
    """One model replica in vLLM; ``role`` decides whether it hands KV pages over, takes them, or neither."""

    def __init__(self, manifest: Manifest, role: Role, options: VllmOptions) -> None:
        self._manifest = manifest
        self._role = role
        self._options = options
        self._core: Core | None = None
        self._stager: RequestStager | None = None
        self._reader: OutputReader | None = None
        self._numbers = itertools.count()
        self._entries: dict[str, Entry] = {}
        """By id in the core: running work."""
        self._core_ids: dict[str, str] = {}
        """Work id -> id in the core, while it runs or its pages are held. A core id is never used twice, since the
        core may still hold pages of an aborted request."""
        self._held: dict[str, str] = {}
        """Id in the core -> work id: prefills whose pages are held."""
        self._aborted: dict[str, Entry] = {}
        self._ahead = Ahead()
        self._steps: asyncio.Queue[Step] = asyncio.Queue()
        self._died: EngineDied | None = None
        self._load = EngineLoad()
        self._steps_ended = 0
        self._rates = LoadRates(manifest.spec.storageClasses)
        self._pages_total = 0
        self._block_tokens = 0
        self._asking: asyncio.Task[None] | None = None

    # -- life ---------------------------------------------------------------------------------------------------

    async def start(self) -> EngineInfo:
        engine_id = f"{self._role}-{uuid.uuid4().hex}"
        # Not in a thread: vLLM keeps state of the process, and other engines may start beside this one.
        config = self._prepare(engine_id)
        options = self._options
        if options.mode == "thread":
            self._core = ThreadCore(config, options.threads)
        else:
            self._core = ProcessCore(config, fork=options.device == "cpu")
        pages = await self._core.start(self._sink)
        model = config.model_config
        sharing = self._manifest.spec.security.cache_sharing if dram_bytes(self._manifest) else None
        self._stager = RequestStager(Limits(model.max_model_len, model.get_vocab_size()), sharing)
        self._reader = OutputReader()
        self._pages_total = pages.total
        self._block_tokens = pages.tokens
        self._load = EngineLoad(pages_free=pages.total)
        if self._manifest.spec.storageClasses:
            self._asking = asyncio.create_task(self._ask_when_idle())
        return info_of(config, pages)

    def _prepare(self, engine_id: str) -> VllmConfig:
        options = self._options
        if options.mode == "process":
            options = replace(options, sockets=str(socket_folder()))
        apply_environment(self._manifest, options)
        shm.sweep()
        return build_config(self._manifest, self._role, options, engine_id)

    async def _ask_when_idle(self) -> None:
        # What its tiers do behind its back, and after its last request, vLLM tells with its steps only: a request
        # that is aborted before it runs makes an empty one.
        while True:
            await asyncio.sleep(_ASK_IDLE_S)
            if self._core is not None and self._died is None and not self._core_ids:
                self._core.add(release_request(f"ask.{next(self._numbers)}", []))

    async def close(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
        # A core does not end while it holds pages for others, which are lost in any case.
        self._release(list(self._held))
        end_s = time.monotonic() + _RELEASE_S
        while self._held and self._died is None and time.monotonic() < end_s:
            await asyncio.sleep(0.01)
        core, self._core = self._core, None
        if core is not None:
            await core.close()
        self._die("the engine is closed")

    def _die(self, why: str) -> None:
        if self._died is None:
            self._died = EngineDied(why)
            self._steps.put_nowait(Step())

    # -- orders -------------------------------------------------------------------------------------------------

    def submit(self, work: Work) -> None:
        if self._core is None or self._stager is None or self._died is not None:
            raise EngineDied("the engine does not run")
        if work.work_id in self._core_ids:
            raise EngineError(f"work {work.work_id} is here already")
        if work.ahead:
            if self._manifest.spec.kv_cache.prefix_caching and self._ahead.offered(work):
                self._fetch_ahead(work)
            return
        self._stop_ahead([work.work_id])
        core_id = f"{work.work_id}.{next(self._numbers)}"
        staged = self._stager.stage(work, core_id)
        self._entries[core_id] = Entry(
            work_id=work.work_id,
            holds=staged.holds,
            whole_output=work.whole_output,
            first_tokens=0 if work.whole_output else len(work.first_tokens),
            cached_tokens=staged.cached_tokens,
            handed=work if work.handoff else None,
        )
        self._core_ids[work.work_id] = core_id
        self._core.add(staged.request)

    def _fetch_ahead(self, work: Work) -> None:
        assert self._core is not None
        assert self._stager is not None
        core_id = f"{work.work_id}.{next(self._numbers)}"
        staged = self._stager.stage(work, core_id)
        self._ahead.begun(work.work_id, core_id)
        self._core.add(staged.request)

    def _stop_ahead(self, work_ids: Iterable[str]) -> None:
        core_ids = [core_id for work_id in work_ids if (core_id := self._ahead.stop(work_id)) is not None]
        if core_ids and self._core is not None:
            self._core.abort(core_ids)

    def abort(self, work_ids: list[str]) -> None:
        self._stop_ahead(work_ids)
        core_ids = [self._core_ids[w] for w in dict.fromkeys(work_ids) if w in self._core_ids]
        running = [core_id for core_id in core_ids if core_id in self._entries]
        for core_id in running:
            entry = self._entries.pop(core_id)
            del self._core_ids[entry.work_id]
            self._aborted[core_id] = entry
        while len(self._aborted) > _ABORTED_KEPT:
            del self._aborted[next(iter(self._aborted))]
        self._release([core_id for core_id in core_ids if core_id in self._held])
        if running and self._core is not None:
            self._core.abort(running)
            cancelled = [EngineOutput(self._aborted[c].work_id, [], Reason.CANCELLED) for c in running]
            self._steps.put_nowait(Step(outputs=cancelled))

    def _release(self, held_ids: list[str]) -> None:
        if held_ids and self._core is not None:
            self._core.add(release_request(f"release.{next(self._numbers)}", held_ids))

    # -- steps --------------------------------------------------------------------------------------------------

    async def step(self) -> Step:
        while True:
            if self._died is not None and self._steps.empty():
                raise self._died
            step = await self._steps.get()
            if step != Step():
                return step

    def load(self) -> EngineLoad:
        return replace(self._load, load_tokens_s=dict(self._rates.tokens_s), steps=self._steps_ended)

    def _sink(self, outputs: EngineCoreOutputs | KVEventBatch | Unheard | Exception) -> None:
        if isinstance(outputs, Exception):
            self._die(f"the engine core is gone: {' '.join(str(outputs).split()) or type(outputs).__name__}")
            return
        if isinstance(outputs, Unheard):
            self._steps.put_nowait(Step(kv_unheard=1))
            return
        from vllm.v1.engine import EngineCoreOutputs

        if not isinstance(outputs, EngineCoreOutputs):
            if changes := changes_of(outputs, self._block_tokens):
                self._steps.put_nowait(Step(kv=changes))
            return
        self._steps_ended += 1
        stats = outputs.scheduler_stats
        if stats is not None:
            self._again(spoilt_of(stats))
        step = Step(outputs=self._read(outputs))
        if stats is not None:
            self._load = load_of(stats, self._pages_total)
            step.transfers.extend(transfers_of(stats))
            self._stop_ahead(transfer.work_id for transfer in step.transfers if transfer.failure)
            step.offers.extend(self._offers(offers_of(stats)))
            step.released.extend(self._released(released_of(stats)))
            step.tiers.update(tiers_of(stats))
            self._rates.saw(step.tiers, self._block_tokens)
        if step != Step():
            computed = sum(output.computed_tokens or 0 for output in step.outputs)
            self._steps.put_nowait(replace(step, prefill_tokens=computed))

    def _again(self, core_ids: list[str]) -> None:
        """Compute here what was computed with pages that were not valid; nobody has seen a token of it."""
        for core_id in core_ids:
            entry = self._entries.pop(core_id, None)
            if entry is None or entry.handed is None or self._core is None:
                continue
            logger.warning("%s is computed again: the pages of its handoff were not valid", entry.work_id)
            self._core.abort([core_id])
            del self._core_ids[entry.work_id]
            self.submit(replace(entry.handed, handoff=b""))

    def _read(self, outputs: EngineCoreOutputs) -> list[EngineOutput]:
        assert self._reader is not None
        read: list[EngineOutput] = []
        late: list[str] = []
        for output in outputs.outputs:
            core_id = output.request_id
            entry = self._entries.get(core_id)
            if entry is None:
                if output.finished and (work := self._ahead.ended(core_id)) is not None:
                    self._fetch_ahead(work)
                aborted = self._aborted.pop(core_id, None) if output.finished else None
                if aborted is not None and aborted.holds:
                    # It ended before the abort arrived, so that the core took no notice of it.
                    late.append(core_id)
                continue
            entry.handed = None
            result = self._reader.read(output, entry)
            read.append(result)
            if result.handoff:
                del self._entries[core_id]
                self._held[core_id] = entry.work_id
            elif result.reason is not None:
                del self._entries[core_id]
                del self._core_ids[entry.work_id]
        self._release(late)
        return read

    def _offers(self, offers: list[tuple[str, bytes]]) -> list[Offer]:
        entries = self._entries
        return [Offer(entries[core_id].work_id, data) for core_id, data in offers if core_id in entries]

    def _released(self, core_ids: list[str]) -> list[str]:
        released = []
        for core_id in core_ids:
            work_id = self._held.pop(core_id, None)
            if work_id is not None:
                del self._core_ids[work_id]
                released.append(work_id)
        return released
