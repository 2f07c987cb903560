"""Worker side: leases are kept, pages are read and checked against the fence. Never blocks on a peer."""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass

from llmserve.kvstore.transfer.base import (
    Handle,
    PeerGone,
    Place,
    Progress,
    Run,
    TransferEngine,
    TransferError,
)
from llmserve.kvstore.transfer.pacing import TokenBucket
from llmserve.kvstore.transfer.pages import Strip, byte_runs, page_runs
from llmserve.workers.connector.leases import Leases, LeaseTable
from llmserve.workers.connector.meta import Pull, StepMeta, TransferStats
from llmserve.workers.connector.scheduler import lease_over
from llmserve.workers.connector.wire import Handoff, RankPages, WireError, decode_rank, done, parse_done

logger = logging.getLogger("vllm.llmserve.connector")

_HOST = Place()
_SLOT_BYTES = 8
_FENCE_SLOTS = 1024
"""Reads under way at once at most."""


@dataclass(frozen=True, slots=True)
class _Peer:
    name: str
    pages: RankPages


@dataclass(slots=True)
class _Read:
    """One request's read: its pages, then the fence."""

    request: str
    pull: Pull
    peer: _Peer
    handle: Handle
    slot: int
    """Of the local table that receives the peer's lease token."""
    started_s: float
    bytes_moved: int
    at_fence: bool = False


@dataclass(slots=True)
class Results:
    """Ids to be reported to the scheduler, each exactly once. ``failed`` is a part of ``received``."""

    sent: set[str]
    received: set[str]
    failed: set[str]


class WorkerSide:
    """One rank's transfers."""

    def __init__(
        self,
        engine: TransferEngine,
        *,
        strips: list[list[Strip]],
        place: Place,
        table: LeaseTable,
        fence: LeaseTable,
        rank: str,
        timeout_s: float,
        bucket: TokenBucket,
    ) -> None:
        """``strips`` by group and layer; ``table`` and ``fence`` and the pages are registered with ``engine``."""
        self._engine = engine
        self._strips = strips
        self._place = place
        self._leases = Leases(table)
        self._fence = fence
        self._fence_free = deque(range(_FENCE_SLOTS))
        self._rank = rank
        self._timeout_s = timeout_s
        self._bucket = bucket
        self._peers: dict[str, _Peer] = {}
        self._waiting: deque[tuple[str, Pull]] = deque()
        self._reads: list[_Read] = []
        self._stuck: list[tuple[_Read, str]] = []
        """Reads that failed and cannot be cancelled yet: their pages may still be written to."""
        self._received: set[str] = set()
        self._failed: set[str] = set()
        self._stats = TransferStats()

    @staticmethod
    def fence_table() -> LeaseTable:
        """Memory for the tokens that are read from peers."""
        return LeaseTable(_FENCE_SLOTS)

    @property
    def only_waits(self) -> bool:
        """Whether pages are held for others and nothing else is under way."""
        return bool(len(self._leases)) and not (self._reads or self._waiting or self._stuck)

    # -- orders of the scheduler --------------------------------------------------------------------------------

    def begin(self, meta: StepMeta) -> None:
        """Carry out what the scheduler ordered for this step."""
        now_s = time.monotonic()
        for slot in meta.disarm:
            self._leases.table.clear(slot)
        for slot, token in meta.arm:
            self._leases.table.arm(slot, token)
        for request, (slot, lease_s) in meta.hold.items():
            self._leases.hold(request, slot, lease_s, now_s)
        for request in meta.release:
            self._leases.end(request, now_s)
        for handoff in meta.dismiss:
            self._dismiss(handoff)
        for kind in meta.failures:
            self._record(0, 0.0, kind)
        self._waiting.extend(meta.pull.items())
        self._start_reads(now_s)

    def _dismiss(self, handoff: Handoff) -> None:
        try:
            self._engine.notify(self._peer(handoff).name, done(handoff.request))
        except (TransferError, WireError) as error:
            self._peers.pop(handoff.engine_id, None)
            logger.info("%s of %s waits for its lease's end: %s", handoff.request, handoff.engine_id, error)

    def _start_reads(self, now_s: float) -> None:
        while self._waiting and self._fence_free:
            request, pull = self._waiting[0]
            try:
                if pull.refusal:
                    raise WireError(pull.refusal)
                if lease_over(pull.handoff.lease_s, now_s - pull.arrived_s):
                    raise _Stale(f"the lease of {pull.handoff.lease_s} s is nearly over")
                if not self._start(request, pull, now_s):
                    return
            except (TransferError, WireError, ValueError) as error:
                logger.warning("pages of %s cannot be read, it is computed here: %s", request, error)
                if isinstance(error, TransferError):
                    self._forget(pull.handoff.engine_id)
                self._report(request, 0, 0.0, _kind(error))
            self._waiting.popleft()

    def _start(self, request: str, pull: Pull, now_s: float) -> bool:
        """Start one read; False if the bucket does not allow it yet."""
        peer = self._peer(pull.handoff)
        runs = self._runs(pull, peer.pages)
        size_bytes = sum(run.size_bytes for run in runs)
        if not self._bucket.take(size_bytes, now_s):
            return False
        handle = self._engine.pull(peer.name, runs, self._place, Place(peer.pages.gpu))
        self._reads.append(_Read(request, pull, peer, handle, self._fence_free.popleft(), now_s, size_bytes))
        return True

    def _runs(self, pull: Pull, pages: RankPages) -> list[Run]:
        if len(pages.strips) != len(self._strips):
            raise WireError(f"{len(pages.strips)} groups of pages there, {len(self._strips)} here")
        runs: list[Run] = []
        for here, there, mine, theirs in zip(pull.local, pull.remote, self._strips, pages.strips, strict=True):
            runs.extend(byte_runs(page_runs(here, there), mine, [Strip(*strip) for strip in theirs]))
        return runs

    def _peer(self, handoff: Handoff) -> _Peer:
        peer = self._peers.get(handoff.engine_id)
        if peer is None:
            data = handoff.ranks.get(self._rank)
            if data is None:
                raise WireError(f"the prefill worker has no rank {self._rank}")
            pages = decode_rank(data)
            if pages.transport != self._engine.name:
                raise WireError(
                    f"the prefill worker moves pages by {pages.transport}, this one by {self._engine.name}"
                )
            peer = self._peers[handoff.engine_id] = _Peer(self._engine.connect(pages.peer), pages)
        return peer

    def _forget(self, engine_id: str) -> None:
        if peer := self._peers.pop(engine_id, None):
            self._engine.forget(peer.name)

    # -- progress -----------------------------------------------------------------------------------------------

    def advance(self) -> Results:
        """Drive everything under way as far as it goes now; returns what ended."""
        now_s = time.monotonic()
        for message in self._engine.notifications():
            request = parse_done(message)
            if request is None:
                logger.warning("a peer sent %d bytes that are no notification", len(message))
            else:
                self._leases.end(request, now_s)
        for request in self._leases.expire(now_s):
            logger.warning("nobody read the pages of %s before the end of its lease: they are freed", request)
        self._stuck = [(read, kind) for read, kind in self._stuck if not self._unstick(read, kind)]
        self._reads = [read for read in self._reads if self._advance(read, now_s)]
        self._start_reads(now_s)
        results = Results(self._leases.take_ended(), self._received, self._failed)
        self._received, self._failed = set(), set()
        return results

    def _advance(self, read: _Read, now_s: float) -> bool:
        """Whether the read goes on."""
        while True:
            progress = self._engine.poll(read.handle)
            if progress is Progress.RUNNING:
                if now_s - read.started_s < self._timeout_s:
                    return True
                return self._fail(read, "timeout")
            if progress is Progress.FAILED:
                return self._fail(read, "peer")
            if read.at_fence:
                return self._check_fence(read)
            self._engine.release(read.handle)
            try:
                read.handle = self._pull_fence(read)
            except TransferError as error:
                logger.warning("the lease of %s cannot be read: %s", read.request, error)
                self._forget(read.pull.handoff.engine_id)
                self._end(read, "peer")
                return False
            read.at_fence = True

    def _pull_fence(self, read: _Read) -> Handle:
        run = Run(
            self._fence.address + read.slot * _SLOT_BYTES,
            read.peer.pages.table + read.pull.handoff.slot * _SLOT_BYTES,
            _SLOT_BYTES,
        )
        self._fence.clear(read.slot)
        return self._engine.pull(read.peer.name, [run], _HOST, _HOST)

    def _check_fence(self, read: _Read) -> bool:
        self._engine.release(read.handle)
        if self._fence.value(read.slot) != read.pull.handoff.token:
            logger.warning("the pages of %s were freed before they were read: it is computed here", read.request)
            self._end(read, "stale")
            return False
        self._end(read, "")
        try:
            self._engine.notify(read.peer.name, done(read.pull.handoff.request))
        except TransferError as error:
            logger.warning("the producer of %s does not hear that its pages are read: %s", read.request, error)
        return False

    def _fail(self, read: _Read, kind: str) -> bool:
        logger.warning("reading the pages of %s failed (%s): it is computed here", read.request, kind)
        if not self._unstick(read, kind):
            self._stuck.append((read, kind))
        return False

    def _unstick(self, read: _Read, kind: str) -> bool:
        # Only when the transfer is off for certain may the pages be used again.
        if not self._engine.release(read.handle):
            return False
        if kind == "peer":
            self._forget(read.pull.handoff.engine_id)
        self._end(read, kind)
        return True

    def _end(self, read: _Read, failure: str) -> None:
        self._fence_free.append(read.slot)
        self._report(read.request, read.bytes_moved, time.monotonic() - read.started_s, failure)

    def _report(self, request: str, bytes_moved: int, seconds: float, failure: str) -> None:
        self._received.add(request)
        if failure:
            self._failed.add(request)
        self._record(0 if failure else bytes_moved, seconds, failure)

    def _record(self, bytes_moved: int, seconds: float, failure: str) -> None:
        self._stats.data["transfers"].append([self._engine.name, "pull", bytes_moved, seconds, failure])

    def take_stats(self) -> TransferStats | None:
        """Transfers that ended since the last call."""
        if self._stats.is_empty():
            return None
        stats, self._stats = self._stats, TransferStats()
        return stats

    def close(self) -> None:
        """Cancel what runs and close the engine."""
        for read in [*self._reads, *(read for read, _ in self._stuck)]:
            self._engine.release(read.handle)
        self._reads.clear()
        self._engine.close()


class _Stale(WireError):
    """The lease is over, or too close to its end."""


def _kind(error: Exception) -> str:
    if isinstance(error, _Stale):
        return "stale"
    if isinstance(error, PeerGone):
        return "peer"
    return "peer" if isinstance(error, TransferError) else "other"
