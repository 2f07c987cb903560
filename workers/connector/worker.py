"""Worker side: leases are kept, pages are read and checked against the fence. Never blocks on a peer."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from llmserve.kvstore.transfer import SAME_HOST
from llmserve.kvstore.transfer.base import Place, Run
from llmserve.kvstore.transfer.ladder import Rung
from llmserve.kvstore.transfer.orders import Attempt, Ends, Fetch, Fetched
from llmserve.kvstore.transfer.pages import Strip, byte_runs, page_runs
from llmserve.kvstore.transfer.runs import RunTable
from llmserve.workers.connector.leases import SLOT_BYTES, Leases, LeaseTable, lease_ends_s
from llmserve.workers.connector.meta import Pull, Said, StepMeta, TransferStats
from llmserve.workers.connector.wire import Handoff, RankPages, WireError, decode_rank, done, parse_done

logger = logging.getLogger("vllm.llmserve.connector")

_FENCE_SLOTS = 1024
"""Reads under way at once at most."""
_NO_RUNG = Rung("none", "pull")
"""Of what failed before an engine was chosen."""


class PageMover(Protocol):
    """As much of ``Mover`` as is used here."""

    def fetch(self, fetch: Fetch) -> None: ...
    def load(self, fetch: Fetch) -> bool: ...
    def finish_loads(self) -> list[Fetched]: ...
    def notify(self, ends: Ends, message: bytes) -> None: ...
    def take_ended(self) -> list[Fetched]: ...
    def take_notes(self) -> list[bytes]: ...
    def close(self) -> None: ...


@dataclass(slots=True)
class _Read:
    """One request's read: its pages, then the fence."""

    pull: Pull
    pages: RankPages
    slot: int
    """Of the local table that receives the peer's lease token."""


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
        mover: PageMover,
        *,
        strips: list[list[Strip]],
        place: Place,
        table: LeaseTable,
        fence: LeaseTable,
        rank: str,
        timeout_s: float,
        mark: Callable[[], object] = lambda: None,
    ) -> None:
        """``strips`` by group and layer; ``table`` and ``fence`` and the pages are registered with ``mover``.

        ``mark`` stands for all work given to the device so far: no page is written to before it is done.
        """
        self._mover = mover
        self._strips = strips
        self._place = place
        self._leases = Leases(table)
        self._fence = fence
        self._fence_free = deque(range(_FENCE_SLOTS))
        self._rank = rank
        self._timeout_s = timeout_s
        self._mark = mark
        self._peers: dict[str, RankPages] = {}
        self._waiting: deque[tuple[str, Pull]] = deque()
        self._reads: dict[str, _Read] = {}
        self._received: set[str] = set()
        self._failed: set[str] = set()
        self._said = Said()
        self._stats = TransferStats()

    @staticmethod
    def fence_table() -> LeaseTable:
        """Memory for the tokens that are read from peers."""
        return LeaseTable(_FENCE_SLOTS)

    @property
    def only_waits(self) -> bool:
        """Whether pages are held for others and nothing else is under way."""
        return bool(len(self._leases)) and not (self._reads or self._waiting)

    # -- orders of the scheduler --------------------------------------------------------------------------------

    def disarm(self, meta: StepMeta) -> None:
        """Before the step writes to any page: some may have been those of a prompt whose token is known."""
        for slot in meta.disarm:
            self._leases.table.clear(slot)

    def begin(self, meta: StepMeta) -> None:
        """Carry out what the scheduler ordered for this step."""
        now_s = time.monotonic()
        for slot, token in meta.arm:
            self._leases.table.arm(slot, token)
        for request, (slot, lease_s) in meta.hold.items():
            self._leases.hold(request, slot, lease_s, now_s)
        for request in meta.release:
            self._leases.end(request, now_s)
        for handoff in meta.dismiss:
            self._dismiss(handoff)
        for kind in meta.failures:
            self._record(Attempt(_NO_RUNG, 0, 0.0, kind), "")
        for request, pull in meta.pull.items():
            if pull.at_once:
                self._load(request, pull)
            else:
                self._waiting.append((request, pull))
        self._start_reads()

    def _dismiss(self, handoff: Handoff) -> None:
        if handoff.ahead:
            return
        try:
            self._mover.notify(self._peer(handoff).ends, done(handoff.request))
        except WireError as error:
            logger.info("%s of %s waits for its lease's end: %s", handoff.request, handoff.engine_id, error)

    def _load(self, request: str, pull: Pull) -> None:
        """This step computes with the pages."""
        try:
            if not self._fence_free:
                raise WireError("too many reads are under way")
            begun = self._mover.load(self._fetch_of(request, pull))
        except (WireError, ValueError) as error:
            begun = False
            logger.warning("pages of %s cannot be loaded: %s", request, error)
        if not begun:
            if read := self._reads.pop(request, None):
                self._fence_free.append(read.slot)
            self._record(Attempt(_NO_RUNG, 0, 0.0, "other"), request)
            self._said.loaded[request] = False

    def _start_reads(self) -> None:
        while self._waiting and self._fence_free:
            request, pull = self._waiting.popleft()
            try:
                self._mover.fetch(self._fetch_of(request, pull))
            except (WireError, ValueError) as error:
                logger.warning("pages of %s cannot be read, it is computed here: %s", request, error)
                self._record(Attempt(_NO_RUNG, 0, 0.0, "other"), request)
                self._report(request, failed=True)

    def _fetch_of(self, request: str, pull: Pull) -> Fetch:
        if pull.refusal:
            raise WireError(pull.refusal)
        pages = self._peer(pull.handoff)
        runs = self._runs(pull, pages)
        slot = self._fence_free.popleft()
        self._fence.clear(slot)
        fence = Run(self._fence.address + slot * SLOT_BYTES, pages.table + pull.handoff.slot * SLOT_BYTES, SLOT_BYTES)
        self._reads[request] = _Read(pull, pages, slot)
        return Fetch(
            id=request,
            ends=pages.ends,
            runs=runs,
            local=self._place,
            remote=Place(pages.gpu),
            fence=fence,
            timeout_s=self._timeout_s,
            expires_s=lease_ends_s(pull.handoff.lease_s, pull.arrived_s),
            after=self._mark(),
        )

    def _runs(self, pull: Pull, pages: RankPages) -> RunTable:
        import numpy

        if len(pages.strips) != len(self._strips):
            raise WireError(f"{len(pages.strips)} groups of pages there, {len(self._strips)} here")
        tables = [
            byte_runs(page_runs(here, there), mine, [Strip(*strip) for strip in theirs]).array
            for here, there, mine, theirs in zip(pull.local, pull.remote, self._strips, pages.strips, strict=True)
        ]
        return RunTable(numpy.concatenate(tables))

    def _peer(self, handoff: Handoff) -> RankPages:
        pages = self._peers.get(handoff.engine_id)
        if pages is None:
            data = handoff.ranks.get(self._rank)
            if data is None:
                raise WireError(f"the prefill worker has no rank {self._rank}")
            pages = self._peers[handoff.engine_id] = decode_rank(data)
        return pages

    # -- progress -----------------------------------------------------------------------------------------------

    def advance(self) -> Results:
        """Take what the mover has done; returns what ended."""
        now_s = time.monotonic()
        for message in self._mover.take_notes():
            request = parse_done(message)
            if request is None:
                logger.warning("a peer sent %d bytes that are no notification", len(message))
            else:
                self._leases.end(request, now_s)
        for request in self._leases.expire(now_s):
            logger.warning("nobody read the pages of %s before the end of its lease: they are freed", request)
        for fetched in self._mover.finish_loads():
            self._said.loaded[fetched.id] = not self._end(fetched)
        for fetched in self._mover.take_ended():
            self._report(fetched.id, failed=bool(self._end(fetched)))
        self._start_reads()
        results = Results(self._leases.take_ended(), self._received, self._failed)
        self._received, self._failed = set(), set()
        return results

    def _end(self, fetched: Fetched) -> str:
        """Why it has failed."""
        read = self._reads.pop(fetched.id)
        self._fence_free.append(read.slot)
        handoff = read.pull.handoff
        failure, attempts = fetched.failure, list(fetched.attempts)
        if not failure and self._fence.value(read.slot) != handoff.token:
            logger.warning("the pages of %s were freed before they were read: it is computed here", fetched.id)
            failure = "stale"
            attempts[-1] = Attempt(attempts[-1].rung, 0, attempts[-1].seconds, failure)
        if failure:
            logger.warning("reading the pages of %s failed (%s): it is computed here", fetched.id, failure)
        elif not handoff.ahead:
            self._mover.notify(read.pages.ends, done(handoff.request))
        for attempt in attempts or [Attempt(_NO_RUNG, 0, 0.0, failure)]:
            self._record(attempt, fetched.id)
        if not failure and attempts[-1].rung.engine == SAME_HOST:
            self._said.near.add((handoff.engine_id, self._rank))
        return failure

    def _report(self, request: str, *, failed: bool) -> None:
        self._received.add(request)
        if failed:
            self._failed.add(request)

    def _record(self, attempt: Attempt, request: str) -> None:
        rung = attempt.rung
        said = [rung.engine, rung.direction, attempt.bytes_moved, attempt.seconds, attempt.failure, request]
        self._stats.data["transfers"].append(said)

    def take_said(self, computed: dict[str, int]) -> Said | None:
        """What the scheduler has to hear with this step's output."""
        said, self._said = self._said, Said()
        said.computed = computed
        return said if said != Said() else None

    def take_stats(self) -> TransferStats | None:
        """Attempts that ended since the last call."""
        if self._stats.is_empty():
            return None
        stats, self._stats = self._stats, TransferStats()
        return stats

    def close(self) -> None:
        """Cancel what runs and close the engines."""
        self._reads.clear()
        self._mover.close()
