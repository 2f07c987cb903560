"""Fetches within one host without the mover's thread.

A copy by a GPU kernel is started in microseconds and asks nothing of anybody until it is done. A thread would first
have to wait for the interpreter, which a busy engine gives up only every few milliseconds. So a load is better still:
the device's next work waits for it, and nobody looks for its end until that work has been given out.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from llmserve.kvstore.transfer.base import Handle, Place, Progress, TransferEngine, TransferError
from llmserve.kvstore.transfer.ladder import COOL_DOWN_MAX_S, COOL_DOWN_S, Rung
from llmserve.kvstore.transfer.orders import Attempt, Fetch, Fetched
from llmserve.kvstore.transfer.runs import size_of

logger = logging.getLogger(__name__)

_HOST = Place()


@dataclass(slots=True)
class _Pull:
    fetch: Fetch
    peer: str
    handle: Handle
    size_bytes: int
    started_s: float


@dataclass(slots=True)
class _Peer:
    name: str
    usable_s: float = 0.0
    failures: int = 0


class Express:
    """Pulls by an engine of the owner's thread. What it cannot do goes to ``otherwise``, which may try all rungs."""

    def __init__(
        self, engine: TransferEngine, otherwise: Callable[[Fetch], None], permits: Callable[[int], bool]
    ) -> None:
        """``permits``: whether so many bytes may be moved now; if so they are charged."""
        self._engine = engine
        self._otherwise = otherwise
        self._permits = permits
        self._rung, self._load_rung = Rung(engine.name, "pull"), Rung(engine.name, "load")
        self._peers: dict[str, _Peer] = {}
        self._pulls: list[_Pull] = []
        self._loads: list[_Pull] = []
        self._off: list[_Pull] = []
        """Given up, and their pages may still be written to."""

    def fetch(self, fetch: Fetch) -> bool:
        """Start the fetch here; False: it is to be done otherwise, and nothing was charged."""
        pull = self._started(fetch)
        if pull is not None:
            self._pulls.append(pull)
        return pull is not None

    def load(self, fetch: Fetch) -> bool:
        """Start the fetch and let the device's work from now on wait for it; False: it cannot be done."""
        pull = self._started(fetch)
        if pull is not None:
            self._engine.hold_up(pull.handle)
            self._loads.append(pull)
        return pull is not None

    def _started(self, fetch: Fetch) -> _Pull | None:
        now_s = time.monotonic()
        peer = self._peers.get(fetch.ends.mover)
        if peer is None:
            said = fetch.ends.engines.get(self._engine.name)
            never = said is None or not self._engine.may_reach(said)
            peer = self._peers[fetch.ends.mover] = _Peer("", math.inf if never else 0.0)
        if now_s < peer.usable_s or now_s > fetch.expires_s:
            return None
        size_bytes = size_of(fetch.runs)
        try:
            if not peer.name:
                peer.name = self._engine.connect(fetch.ends.engines[self._engine.name])
            if not self._permits(size_bytes):
                return None
            self._engine.order_after(fetch.after)
            handle = self._engine.pull(peer.name, fetch.runs, fetch.local, fetch.remote)
        except TransferError as error:
            self._failed(peer, str(error))
            return None
        return _Pull(fetch, peer.name, handle, size_bytes, now_s)

    def _failed(self, peer: _Peer, why: str) -> None:
        wait_s = min(COOL_DOWN_S * 2.0**peer.failures, COOL_DOWN_MAX_S)
        logger.warning("express pulls by %s are off for %g s: %s", self._engine.name, wait_s, why)
        self._engine.forget(peer.name)
        peer.name, peer.usable_s, peer.failures = "", time.monotonic() + wait_s, peer.failures + 1

    def finish_loads(self) -> list[Fetched]:
        """Wait for all loads; what failed is not tried again."""
        loads, self._loads = self._loads, []
        return [self._loaded(pull) for pull in loads]

    def _loaded(self, pull: _Pull) -> Fetched:
        self._engine.finish(pull.handle)
        fine = self._engine.poll(pull.handle) is Progress.DONE and self._fenced(pull)
        seconds = time.monotonic() - pull.started_s
        if fine:
            return Fetched(pull.fetch.id, "", [Attempt(self._load_rung, pull.size_bytes, seconds)])
        self._failed(self._peers[pull.fetch.ends.mover], f"{pull.fetch.id} failed")
        return Fetched(pull.fetch.id, "peer", [Attempt(self._load_rung, 0, seconds, "peer")])

    def take_ended(self) -> list[Fetched]:
        """Fetches that are done, with the fence; those that failed are ordered otherwise."""
        if not (self._pulls or self._off):
            return []
        now_s = time.monotonic()
        ended: list[Fetched] = []
        running: list[_Pull] = []
        for pull in self._pulls:
            progress = self._engine.poll(pull.handle)
            if progress is Progress.RUNNING and now_s - pull.started_s < pull.fetch.timeout_s / 2:
                running.append(pull)
            elif progress is Progress.DONE and self._fenced(pull):
                self._peers[pull.fetch.ends.mover].failures = 0
                seconds = time.monotonic() - pull.started_s
                ended.append(Fetched(pull.fetch.id, "", [Attempt(self._rung, pull.size_bytes, seconds)]))
            else:
                self._off.append(pull)
        self._pulls = running
        self._off = [pull for pull in self._off if not self._handed_on(pull)]
        return ended

    def _fenced(self, pull: _Pull) -> bool:
        self._engine.release(pull.handle)
        if pull.fetch.fence is None:
            return True
        try:
            fence = self._engine.pull(pull.peer, [pull.fetch.fence], _HOST, _HOST)
        except TransferError as error:
            logger.warning("the lease of %s cannot be read: %s", pull.fetch.id, error)
            return False
        # So small a copy has ended when it returns.
        return self._engine.poll(fence) is Progress.DONE

    def _handed_on(self, pull: _Pull) -> bool:
        if not self._engine.release(pull.handle):
            return False
        peer = self._peers[pull.fetch.ends.mover]
        if peer.name:
            self._failed(peer, f"{pull.fetch.id} failed or stalled")
        self._otherwise(pull.fetch)
        return True

    def close(self) -> None:
        self._engine.close()
