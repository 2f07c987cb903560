"""Fetches under way: each is tried on one rung after the other until it has its pages or nothing is left to try.

A push is ordered by the end that wants the pages: it asks the other one to write, and hears when that is done. Until
then its pages may be written to, which is why a push that stalls only ends when the peer says so or is gone.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from llmserve.kvstore.transfer.base import (
    FingerprintMismatch,
    Handle,
    PeerGone,
    Place,
    Progress,
    TransferEngine,
    TransferError,
)
from llmserve.kvstore.transfer.calls import Ask, Pushed, Stop
from llmserve.kvstore.transfer.ladder import Rung
from llmserve.kvstore.transfer.orders import Attempt, Ends, Fetch, Fetched
from llmserve.kvstore.transfer.peers import Peer, Peers
from llmserve.kvstore.transfer.runs import table_of

logger = logging.getLogger(__name__)

_HOST = Place()
_PATIENCE_MIN_S = 0.2
_STALL_PART = 0.25
"""Of the deadline: an attempt that has taken so much, and four times what it should, has stalled."""


@dataclass(slots=True)
class Job:
    """One fetch, and the attempt at it that is under way."""

    fetch: Fetch
    peer: Peer
    size_bytes: int
    begun_s: float = 0.0
    probe: Rung | None = None
    attempts: list[Attempt] = field(default_factory=list)
    tried: set[Rung] = field(default_factory=set)
    rung: Rung | None = None
    started_s: float = 0.0
    handle: Handle | None = None
    """Of a pull; None while a push is waited for."""
    push_id: int = 0
    at_fence: bool = False
    stopping: str = ""
    """Why the attempt is given up: it goes on as soon as memory is certain not to be written to any more."""
    stop_told: bool = False


class Fetches:
    """Probes among them: those end without anybody being told."""

    def __init__(
        self, engines: Mapping[str, TransferEngine], peers: Peers, ends: Ends, clock: Callable[[], float]
    ) -> None:
        self._engines, self._peers, self._ends, self._clock = engines, peers, ends, clock
        self._jobs: list[Job] = []
        self._pushed: dict[int, Pushed] = {}
        self._push_ids = 0
        self.ended: deque[Fetched] = deque()

    def __bool__(self) -> bool:
        return bool(self._jobs)

    def begin(self, job: Job, now_s: float) -> bool:
        """Start it on the best rung; False: it has ended already."""
        job.begun_s = now_s
        if not self._attempt(job, now_s):
            return False
        self._jobs.append(job)
        return True

    def heard(self, pushed: Pushed) -> None:
        """A peer says that a push has ended."""
        if pushed.mover == self._ends.mover and any(job.push_id == pushed.id for job in self._jobs):
            self._pushed[pushed.id] = pushed

    def advance(self) -> None:
        """See where all of them stand."""
        self._jobs = [job for job in self._jobs if not self._advanced(job)]

    def close(self) -> None:
        """Cancel what can be cancelled."""
        for job in self._jobs:
            if job.handle is not None and job.rung is not None:
                self._engines[job.rung.engine].release(job.handle)

    def _attempt(self, job: Job, now_s: float) -> bool:
        """Start on the next rung that starts; False: the fetch has ended."""
        while True:
            if now_s > job.fetch.expires_s:
                self._end(job, "stale")
                return False
            left_s = job.begun_s + job.fetch.timeout_s - now_s
            rung = job.probe or job.peer.ladder.choose(now_s, job.tried)
            if rung is None or rung in job.tried or (left_s <= 0 and job.attempts):
                last = job.attempts[-1].failure if job.attempts else "peer"
                self._end(job, last)
                return False
            job.rung, job.started_s, job.at_fence, job.stopping, job.stop_told = rung, now_s, False, "", False
            job.tried.add(rung)
            try:
                self._submit(job, rung)
                return True
            except FingerprintMismatch as error:
                logger.warning("fetch %s: %s", job.fetch.id, error)
                job.attempts.append(Attempt(rung, 0, 0.0, "fingerprint"))
                self._end(job, "fingerprint")
                return False
            except TransferError as error:
                self._failed(job, "peer", f"{error}")

    def _submit(self, job: Job, rung: Rung) -> None:
        engine, fetch = self._engines[rung.engine], job.fetch
        if rung.direction == "pull":
            name = self._peers.connected(job.peer, rung.engine)
            engine.order_after(fetch.after)
            job.handle = engine.pull(name, fetch.runs, fetch.local, fetch.remote)
            return
        self._push_ids += 1
        job.push_id, job.handle = self._push_ids, None
        engine.settle(fetch.after)
        runs = table_of(fetch.runs)[:, [1, 0, 2]].tobytes()
        ask = Ask(job.push_id, self._ends, rung.engine, runs, fetch.local.gpu, fetch.remote.gpu)
        if not self._peers.say(job.peer, ask):
            raise PeerGone("the peer cannot be asked")

    def _failed(self, job: Job, kind: str, why: str) -> None:
        rung = job.rung
        assert rung is not None
        now_s = self._clock()
        wait_s = job.peer.ladder.failed(rung, now_s)
        job.attempts.append(Attempt(rung, 0, now_s - job.started_s, kind))
        log = logger.info if job.probe else logger.warning
        log("%s by %s failed (%s): %s; not used for %g s", job.fetch.id, rung, kind, why, wait_s)
        if kind == "peer":
            self._peers.forget(job.peer, rung.engine)

    def _advanced(self, job: Job) -> bool:
        """Whether the fetch has ended, by an error that nobody expected too."""
        try:
            return self._advance(job, self._clock())
        except Exception:
            logger.exception("fetch %s by %s", job.fetch.id, job.rung)
            if job.stopping:
                # Whether its pages may still be written to is not known: it stays.
                return False
            job.stopping = "other"
            return False

    def _advance(self, job: Job, now_s: float) -> bool:
        """Whether the fetch has ended."""
        assert job.rung is not None
        if job.stopping:
            return self._advance_stopping(job, now_s)
        progress = self._progress(job)
        if progress is Progress.RUNNING:
            if now_s - job.started_s < self._patience_s(job):
                return False
            return self._give_up(job, "timeout", now_s)
        if progress is Progress.FAILED:
            return self._give_up(job, "peer", now_s)
        if job.handle is not None:
            self._engines[job.rung.engine].release(job.handle)
            job.handle = None
        if job.at_fence or job.fetch.fence is None:
            return self._succeed(job, now_s)
        job.at_fence = True
        try:
            name = self._peers.connected(job.peer, job.rung.engine)
            job.handle = self._engines[job.rung.engine].pull(name, [job.fetch.fence], _HOST, _HOST)
        except TransferError as error:
            self._failed(job, "peer", str(error))
            return not self._attempt(job, now_s)
        return self._advance(job, now_s)

    def _progress(self, job: Job) -> Progress:
        assert job.rung is not None
        if job.handle is not None:
            return self._engines[job.rung.engine].poll(job.handle)
        pushed = self._pushed.pop(job.push_id, None)
        if pushed is None:
            return Progress.RUNNING
        if not pushed.ok:
            logger.info("%s: the peer could not push: %s", job.fetch.id, pushed.reason)
        return Progress.DONE if pushed.ok else Progress.FAILED

    def _patience_s(self, job: Job) -> float:
        assert job.rung is not None
        left_s = job.begun_s + job.fetch.timeout_s - job.started_s
        if job.peer.ladder.choose(self._clock(), job.tried) is None:
            return left_s
        expected_s = job.peer.ladder.expected_s(job.rung, job.size_bytes) or 0.0
        return min(left_s, max(_PATIENCE_MIN_S, _STALL_PART * job.fetch.timeout_s, 4 * expected_s))

    def _give_up(self, job: Job, kind: str, now_s: float) -> bool:
        job.stopping = kind
        return self._advance_stopping(job, now_s)

    def _advance_stopping(self, job: Job, now_s: float) -> bool:
        assert job.rung is not None
        if not self._is_off(job):
            return False
        job.handle = None
        kind, job.stopping = job.stopping, ""
        self._failed(job, kind, "stalled" if kind == "timeout" else "the transfer ended with an error")
        if job.probe is not None:
            self._end(job, kind)
            return True
        return not self._attempt(job, now_s)

    def _is_off(self, job: Job) -> bool:
        """Whether the attempt cannot write to the pages any more."""
        assert job.rung is not None
        engine = self._engines[job.rung.engine]
        if job.handle is not None:
            return engine.release(job.handle)
        if job.at_fence or job.stopping == "peer" or self._pushed.pop(job.push_id, None) is not None:
            return True
        if not job.stop_told:
            job.stop_told = True
            if not self._peers.say(job.peer, Stop(self._ends.mover, job.push_id)):
                return True
        return not self._peers.reachable(job.peer)

    def _succeed(self, job: Job, now_s: float) -> bool:
        assert job.rung is not None
        seconds = now_s - job.started_s
        job.attempts.append(Attempt(job.rung, job.size_bytes, seconds))
        if job.probe is not None:
            job.peer.ladder.probed(job.rung, job.size_bytes, seconds)
        elif job.peer.ladder.moved(job.rung, job.size_bytes, seconds):
            logger.warning("%s has become slow: the pair is probed anew", job.rung)
        self._end(job, "")
        return True

    def _end(self, job: Job, failure: str) -> None:
        if job.probe is None:
            self.ended.append(Fetched(job.fetch.id, failure, job.attempts))
        elif not job.peer.ladder.due(self._clock()):
            rates = ", ".join(f"{rung} {rate / 1e9:.2f} GB/s" for rung, rate in job.peer.ladder.rates().items())
            logger.info("transfer rates to %s: %s", job.peer.ends.mover[:8], rates)
