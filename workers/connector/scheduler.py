"""Scheduler side: which pages are held, which are read, and under which lease. No I/O.

It runs in the engine core's thread, as ``KVConnectorBase_V1`` describes its methods.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmserve.workers.connector.leases import new_token
from llmserve.workers.connector.meta import Pull, RankMeta, StepMeta, TransferStats
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

NULL_PAGE = 0
"""vLLM's placeholder for pages that a sliding window has left behind."""


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


@dataclass(slots=True)
class _Pending:
    handoff: Handoff
    arrived_s: float


class SchedulerSide:
    """State of the leases given and of the handoffs to be read."""

    def __init__(self, settings: SchedulerSettings) -> None:
        self._settings = settings
        self._fingerprint = ""
        self._ranks: dict[str, bytes] = {}
        self._free_slots = deque(range(settings.slots))
        self._armed: dict[str, tuple[int, int]] = {}
        """Request -> (slot, token), from its first allocation until its pages are free."""
        self._held: set[str] = set()
        self._pending: dict[str, _Pending] = {}
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
            self._pending[request.request_id] = _Pending(decode_handoff(data), time.monotonic())
        except WireError as error:
            logger.error("request %s is computed here: %s", request.request_id, error)
            self._meta.failures.append("other")

    def matched_tokens(self, request: Request, computed_tokens: int) -> tuple[int, bool]:
        """(tokens to be read beyond ``computed_tokens``, whether the request waits for them)."""
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
        tokens = min(handoff.tokens, request.num_prompt_tokens) - computed_tokens
        return (tokens, True) if tokens > 0 else (0, False)

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
        # Once only: after a preemption, or a read that failed, the pages may be gone.
        pending = self._pending.pop(request_id, None)
        if pending is None:
            return
        if external_tokens == 0:
            self._meta.dismiss.append(pending.handoff)
            return
        end = min(pending.handoff.tokens, request.num_prompt_tokens)
        self._meta.pull[request_id] = self._pull(pending, blocks.get_block_ids(), end - external_tokens, end)

    def _pull(self, pending: _Pending, pages: tuple[list[int], ...], start: int, end: int) -> Pull:
        local: list[list[int]] = []
        remote: list[list[int]] = []
        refusal = ""
        settings = self._settings
        for group, page_tokens, theirs in zip(
            settings.groups, settings.page_tokens, pending.handoff.pages, strict=True
        ):
            first, last = start // page_tokens, -(-end // page_tokens)
            here, there = pages[group][first:last], theirs[first:last]
            if len(here) != last - first or len(there) != last - first:
                refusal = f"pages {first} to {last} wanted, {len(here)} are here and {len(there)} there"
            pairs = [(h, t) for h, t in zip(here, there, strict=False) if h != NULL_PAGE]
            if any(t == NULL_PAGE for _, t in pairs):
                refusal = "the prefill worker has dropped pages of its sliding window that are needed here"
            local.append([h for h, _ in pairs])
            remote.append([t for _, t in pairs])
        return Pull(pending.handoff, local, remote, pending.arrived_s, refusal)

    # -- steps --------------------------------------------------------------------------------------------------

    def take_meta(self, *, idle: bool) -> StepMeta:
        """What the workers have to do in this step."""
        meta, self._meta = self._meta, StepMeta()
        meta.idle = idle
        return meta

    def on_output(self, output: KVConnectorOutput) -> None:
        """All ranks have reported these; the scheduler frees the pages next."""
        for request_id in output.finished_sending or ():
            self._held.discard(request_id)
            slot, _ = self._armed.pop(request_id)
            self._free_slots.append(slot)
            self._stats.data["released"].append(request_id)

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
        if pending := self._pending.pop(request_id, None):
            self._meta.dismiss.append(pending.handoff)
        armed = self._armed.get(request_id)
        if armed is None:
            return False, None
        slot, token = armed
        settings = self._settings
        covered = [
            pages[group][: -(-request.num_prompt_tokens // page_tokens)]
            for group, page_tokens in zip(settings.groups, settings.page_tokens, strict=True)
        ]
        if not hold or not any(covered):
            # The token was never published, so that the slot only has to be clear before its next use.
            del self._armed[request_id]
            self._meta.disarm.append(slot)
            self._free_slots.append(slot)
            return False, None
        self._held.add(request_id)
        self._meta.hold[request_id] = (slot, settings.lease_s)
        handoff = Handoff(
            engine_id=settings.engine_id,
            fingerprint=self._fingerprint,
            request=request_id,
            slot=slot,
            token=token,
            tokens=request.num_prompt_tokens,
            lease_s=settings.lease_s,
            tp=settings.tp,
            pp=settings.pp,
            pages=covered,
            ranks=self._ranks,
        )
        return True, {HANDOFF: encode(handoff)}


def lease_over(lease_s: float, age_s: float) -> bool:
    """Whether a lease that is at least ``age_s`` old is too close to its end for a read to begin.

    The fence alone decides what is valid; this spares transfers that it would most likely refuse.
    """
    return lease_ends_s(lease_s, 0.0) < age_s


def lease_ends_s(lease_s: float, begun_s: float) -> float:
    """Until when a read may begin."""
    return begun_s + lease_s - min(1.0, lease_s / 10)
