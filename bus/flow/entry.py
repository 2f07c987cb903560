"""One request as the router knows it."""

from __future__ import annotations

import enum
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmserve.bus.base import StoredRequest
from llmserve.bus.flow.prefix import Prefix
from llmserve.bus.flow.queue import FairQueue
from llmserve.bus.messages import HandedOff, Stage

if TYPE_CHECKING:
    from llmserve.bus.flow.credits import WorkerState


class Place(enum.Enum):
    """Where a known request is; it is in exactly one place."""

    QUEUED = "queued"
    """Waits for a worker that prefills it, or runs it whole."""
    GRANTED = "granted"
    """Sent to a worker that has not confirmed yet."""
    RUNNING = "running"
    WAITING = "waiting"
    """Handed off: its pages wait for a decode worker."""
    LOST = "lost"
    """Its gateway was told that the attempt is lost, and has not replaced or discarded it yet."""


IN_ORDER = frozenset({Place.QUEUED, Place.WAITING})
ON_WORKER = frozenset({Place.GRANTED, Place.RUNNING})


@dataclass(slots=True)
class Charge:
    """What a request was charged in one stage's order."""

    queue: FairQueue[Entry]
    cost: float


@dataclass(slots=True, eq=False)
class Entry:
    """One attempt of a request, and where it is."""

    seq: int
    tenant: str
    klass: str
    request_id: str
    gateway: str
    attempt: int
    prompt_tokens: int
    max_tokens: int
    offset: int
    api: str
    data: bytes
    """The encoded request; empty if it is granted by its sequence alone."""
    seen_s: float
    """When the router saw it first."""
    since_s: float
    """Since when it is in its place."""
    place: Place = Place.QUEUED
    stage: Stage = Stage.PREFILL
    """What its worker runs, or ran last."""
    stamp: int = 0
    """Counts its moves, so that a timer knows whether it is out of date."""
    deaths: int = 0
    """Workers that died while they ran it or an earlier attempt."""
    prefix: Prefix | None = None
    """The blocks of its prompt, as far as its gateway named them."""
    work_tokens: int = 0
    """Prompt tokens that its worker has to compute, or had to: all of them until a placement knows better."""
    cached_tokens: int = 0
    """Prompt tokens that its worker is expected to reuse."""
    loaded_bytes: int = 0
    """Of their pages, those that its worker is expected to load from a tier or another worker."""
    paid: bool = False
    ticket: int = 0
    queue: FairQueue[Entry] | None = None
    """The order it stands in, or stood in last."""
    charges: list[Charge] = field(default_factory=list)
    worker: WorkerState | None = None
    pages: int = 0
    """Set aside for it on its worker."""
    listed: bool = False
    """Its worker's inventory has shown it."""
    handoff: HandedOff | None = None
    holder: WorkerState | None = None
    """The worker that holds the pages of ``handoff``."""
    lease_until_s: float = 0.0
    ahead: WorkerState | None = None
    """The decode worker that fetches its pages while they are computed."""
    counted: bool = False
    """Part of the budgets' sums."""
    decode_kv_bytes: int = 0
    """Of ``max_kv_hbm_bytes``, set aside from its prefill on until a decode worker has its pages."""
    ahead_bytes: int = 0
    """What its handoff moves, or is expected to, from its prefill on until a decode worker has it."""
    cancelled: bool = False
    blameless: bool = False
    """It was lost while it waited."""
    checking: bool = False
    """``CheckStored`` is on its way."""
    blocked_since_s: float | None = None
    """Since when it is the head of its tenant and too large for what is free."""

    @classmethod
    def of(cls, stored: StoredRequest, now_s: float, inline_bytes: int) -> Entry:
        request = stored.request
        return cls(
            seq=stored.seq,
            # Each message brings strings of its own: with one for all, look-ups need not compare them.
            tenant=sys.intern(stored.tenant),
            klass=sys.intern(stored.klass),
            request_id=request.request_id,
            gateway=request.gateway,
            attempt=request.attempt,
            prompt_tokens=request.prompt_tokens,
            max_tokens=request.max_tokens,
            offset=request.offset,
            api=request.api,
            data=stored.data if len(stored.data) <= inline_bytes else b"",
            seen_s=now_s,
            since_s=now_s,
            deaths=request.deaths,
            paid=request.attempt > 0,
            prefix=Prefix.of(request),
            work_tokens=request.prompt_tokens,
        )

    @property
    def is_batch(self) -> bool:
        return self.klass == "batch"

    @property
    def bound_tokens(self) -> int:
        """The most tokens that it can come to hold."""
        return self.prompt_tokens + self.max_tokens

    @property
    def before_decode(self) -> bool:
        """Whether it is prefilled for another worker, or waits for that one."""
        return self.place is Place.WAITING or (self.place in ON_WORKER and self.stage is Stage.PREFILL)

    @property
    def is_suspect(self) -> bool:
        """Whether it was there at the deaths of two workers: apart from others like it, the next death will tell."""
        return self.deaths >= 2

    def move(self, place: Place, now_s: float) -> None:
        self.place = place
        self.since_s = now_s
        self.stamp += 1
        self.checking = False
        self.blocked_since_s = None
