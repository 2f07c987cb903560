"""Scheduler side: which pages are held, which are read, and under which lease. No I/O.

It runs in the engine core's thread, as ``KVConnectorBase_V1`` describes its methods.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmserve.workers.connector.at_once import AtOnce, Load
from llmserve.workers.connector.leases import lease_over, new_token
from llmserve.workers.connector.meta import Pull, RankMeta, Said, StepMeta, TransferStats
from llmserve.workers.connector.pairing import paired
from llmserve.workers.connector.wire import (
    HANDOFF,
    HOLD,
    RELEASE,
    Handoff,
    WireError,
    decode_handoff,
    encode,
    rank_key,
)

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = logging.getLogger("vllm.llmserve.connector")
"""Below ``vllm``, whose logger is the one that engine processes configure."""


@dataclass(frozen=True, slots=True)
class SchedulerSettings:
    """What the scheduler side has to know of its engine."""

    engine_id: str
    lease_s: float
    tp: int
    pp: int
    groups: tuple[int, ...]
    """Ids of the KV cache groups that are handed over."""
    page_tokens: tuple[int, ...]
    """Tokens of a page, for each of ``groups``."""
    slots: int
    """Of the lease table: as many as there are pages, since each lease holds one at least."""
    ahead: bool = False
    """Whether pages are offered while their prompt is still being computed."""


@dataclass(slots=True)
class _Pending:
    handoff: Handoff
    arrived_s: float
    at_once: bool = False
    """As vLLM was last told."""


class SchedulerSide:
    """State of the leases given and of the handoffs to be read."""

    def __init__(
        self,
        settings: SchedulerSettings,
        pages_of: Callable[[str], tuple[list[int], ...]],
        at_once: AtOnce,
        evict: Callable[[set[int]], None],
    ) -> None:
        """``pages_of``: the page numbers of a running request, by group. ``evict`` takes pages out of the prefix
        cache."""
        self._settings = settings
        self._pages_of = pages_of
        self._at_once = at_once
        self._evict = evict
        self._fingerprint = ""
        self._ranks: dict[str, bytes] = {}
        self._free_slots = deque(range(settings.slots))
        self._armed: dict[str, tuple[int, int]] = {}
        """Request -> (slot, token), from its first allocation until its pages are free."""
        self._held: set[str] = set()
        self._prefills: dict[str, Request] = {}
        """Those of ``_armed`` whose prompt is not computed yet."""
        self._pending: dict[str, _Pending] = {}
        self._reading_ahead: set[str] = set()
        """Requests that only fetch the pages of a prompt that another engine computes."""
        self._meta = StepMeta()
        self._stats = TransferStats()

    # -- start --------------------------------------------------------------------------------------------------

    def set_ranks(self, metadata: dict[tuple[int, int], RankMeta]) -> None:
        """What the workers say of their pages, by (pp, tp)."""
        fingerprints = {meta.fingerprint for meta in metadata.values()}
        if len(fingerprints) != 1:
            raise ValueError(f"ranks of one engine have different KV layouts: {sorted(fingerprints)}")
        self._fingerprint = fingerprints.pop()
        self._ranks = {rank_key(pp, tp): meta.pages for (pp, tp), meta in metadata.items()}

    # -- requests come ------------------------------------------------------------------------------------------

    def on_new_request(self, request: Request) -> None:
        params = request.kv_transfer_params or {}
        self._meta.release.extend(params.get(RELEASE, ()))
        data = params.get(HANDOFF)
        if data is None:
            return
        try:
            handoff = decode_handoff(data)
            self._pending[request.request_id] = _Pending(handoff, time.monotonic())
            if handoff.ahead:
                self._reading_ahead.add(request.request_id)
        except WireError as error:
            logger.error("request %s is computed here: %s", request.request_id, error)
            self._meta.failures.append("other")

    def matched_tokens(self, request: Request, computed_tokens: int) -> tuple[int | None, bool]:
        """(tokens to be read beyond ``computed_tokens``, whether the request waits for them); None: not now."""
        tokens, waits = self._readable(request, computed_tokens)
        if not tokens and request.request_id in self._reading_ahead:
            # It must not compute what it cannot read; its owner takes it back.
            return None, False
        if self._at_once.doubts(computed_tokens):
            return None, False
        return tokens, waits

    def _readable(self, request: Request, computed_tokens: int) -> tuple[int, bool]:
        pending = self._pending.get(request.request_id)
        if pending is None:
            return 0, False
        handoff = pending.handoff
        if refusal := self._refusal(handoff):
            logger.warning("request %s is computed here: %s", request.request_id, refusal)
            del self._pending[request.request_id]
            self._meta.failures.append("fingerprint")
            return 0, False
        if lease_over(handoff.lease_s, time.monotonic() - pending.arrived_s):
            logger.warning("request %s is computed here: its lease is nearly over", request.request_id)
            del self._pending[request.request_id]
            self._meta.dismiss.append(handoff)
            self._meta.failures.append("stale")
            return 0, False
        pending.at_once = self._at_once.may(handoff, min(handoff.tokens, request.num_prompt_tokens) - computed_tokens)
        tokens = _end(pending, request) - computed_tokens
        return (tokens, not pending.at_once) if tokens > 0 else (0, False)

    def _refusal(self, handoff: Handoff) -> str:
        settings = self._settings
        if (handoff.tp, handoff.pp) != (settings.tp, settings.pp):
            return (
                f"the prefill worker has TP {handoff.tp} and PP {handoff.pp}, "
                f"this one {settings.tp} and {settings.pp}; only equal ones hand over"
            )
        if handoff.fingerprint != self._fingerprint:
            return f"KV pages of kind {handoff.fingerprint} cannot be used, this engine's are {self._fingerprint}"
        if len(handoff.pages) != len(settings.groups):
            return f"{len(handoff.pages)} groups of pages, this engine has {len(settings.groups)}"
        return ""

    def allocated(self, request: Request, blocks: KVCacheBlocks, external_tokens: int) -> None:
        """Pages were allocated; ``external_tokens`` of them are to be read."""
        request_id = request.request_id
        if (request.kv_transfer_params or {}).get(HOLD) and request_id not in self._armed and self._free_slots:
            self._armed[request_id] = armed = (self._free_slots.popleft(), new_token())
            self._meta.arm.append(armed)
            if self._settings.ahead:
                self._prefills[request_id] = request
        # Once only: after a preemption, or a read that failed, the pages may be gone.
        pending = self._pending.pop(request_id, None)
        if pending is None:
            return
        if external_tokens == 0:
            self._meta.dismiss.append(pending.handoff)
            return
        handoff, end = pending.handoff, _end(pending, request)
        start = end - external_tokens
        ours = self._groups_of(blocks.get_block_ids())
        local, remote, refusal = paired(self._settings.page_tokens, ours, handoff.pages, start, end)
        self._meta.pull[request_id] = Pull(handoff, local, remote, pending.arrived_s, refusal, pending.at_once)
        if pending.at_once:
            pages = tuple(page for group in local for page in group)
            self._at_once.begun(request_id, Load(handoff.engine_id, start, pages))

    # -- steps --------------------------------------------------------------------------------------------------

    def take_meta(self, scheduled: Mapping[str, int], preempted: Collection[str] = ()) -> StepMeta:
        """What the workers have to do in this step, which computes so many tokens of each request."""
        for request_id in preempted:
            self._disarm(request_id)
        meta, self._meta = self._meta, StepMeta()
        meta.idle = not scheduled
        for request_id, request in list(self._prefills.items()):
            tokens = request.num_computed_tokens + scheduled.get(request_id, 0)
            if tokens >= request.num_prompt_tokens:
                del self._prefills[request_id]
            elif request_id in scheduled:
                meta.computed[request_id] = tokens
        return meta

    def _disarm(self, request_id: str) -> None:
        """Its pages are free, and its token may be known."""
        self._prefills.pop(request_id, None)
        if armed := self._armed.pop(request_id, None):
            self._meta.disarm.append(armed[0])
            self._free_slots.append(armed[0])

    def on_output(self, output: KVConnectorOutput) -> None:
        """All ranks have reported these; the scheduler frees the pages next."""
        for request_id in output.finished_sending or ():
            self._held.discard(request_id)
            slot, _ = self._armed.pop(request_id)
            self._free_slots.append(slot)
            self._stats.data["released"].append(request_id)
        if isinstance(said := output.kv_connector_worker_meta, Said):
            for request_id, tokens in said.computed.items():
                self._offer(request_id, tokens)
            for request_id, load in self._at_once.heard(said):
                self._evict(set(load.pages))
                self._stats.data["spoilt"].append(request_id)

    def _offer(self, request_id: str, tokens: int) -> None:
        """Tell of the first pages of a prompt, unless it has gone or ended meanwhile."""
        (page_tokens,) = self._settings.page_tokens
        pages = tokens // page_tokens
        if pages and request_id in self._armed and request_id not in self._held:
            covered = [group[:pages] for group in self._groups_of(self._pages_of(request_id))]
            handoff = self._handoff(request_id, pages * page_tokens, covered, ahead=True)
            self._stats.data["ahead"].append([request_id, encode(handoff)])

    def take_stats(self) -> TransferStats | None:
        if self._stats.is_empty():
            return None
        stats, self._stats = self._stats, TransferStats()
        return stats

    def has_work(self) -> bool:
        """Whether the workers have to be told something although nothing is computed."""
        meta = self._meta
        return bool(meta.dismiss or meta.release or meta.failures or meta.disarm)

    # -- requests end -------------------------------------------------------------------------------------------

    def finished(
        self, request: Request, pages: tuple[list[int], ...], *, hold: bool
    ) -> tuple[bool, dict[str, Any] | None]:
        """(whether the pages stay, parameters for the output); ``hold`` says that the prefill ended as planned."""
        request_id = request.request_id
        self._reading_ahead.discard(request_id)
        if pending := self._pending.pop(request_id, None):
            self._meta.dismiss.append(pending.handoff)
        self._prefills.pop(request_id, None)
        armed = self._armed.get(request_id)
        if armed is None:
            return False, None
        settings = self._settings
        covered = [
            group[: -(-request.num_prompt_tokens // page_tokens)]
            for group, page_tokens in zip(self._groups_of(pages), settings.page_tokens, strict=True)
        ]
        if not hold or not any(covered):
            self._disarm(request_id)
            return False, None
        self._held.add(request_id)
        self._meta.hold[request_id] = (armed[0], settings.lease_s)
        return True, {HANDOFF: encode(self._handoff(request_id, request.num_prompt_tokens, covered))}

    def _groups_of(self, pages: tuple[list[int], ...]) -> list[list[int]]:
        return [pages[group] for group in self._settings.groups]

    def _handoff(self, request_id: str, tokens: int, pages: list[list[int]], *, ahead: bool = False) -> Handoff:
        settings, (slot, token) = self._settings, self._armed[request_id]
        return Handoff(
            engine_id=settings.engine_id,
            fingerprint=self._fingerprint,
            request=request_id,
            slot=slot,
            token=token,
            tokens=tokens,
            lease_s=settings.lease_s,
            tp=settings.tp,
            pp=settings.pp,
            pages=pages,
            ranks=self._ranks,
            ahead=ahead,
        )


def _end(pending: _Pending, request: Request) -> int:
    """Tokens of the prompt that are there after the read. A request that runs at once has to compute one itself."""
    limit: int = request.num_prompt_tokens - pending.at_once
    return min(pending.handoff.tokens, limit)
