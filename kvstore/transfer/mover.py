"""A thread that moves pages: it owns the engines, fetches for its owner, probes, and serves peers.

The owner orders fetches and takes what ended; nothing here makes it wait. A peer's engines are driven by its own
mover, so that pages can be read while their owner computes.
"""

from __future__ import annotations

import logging
import math
import os
import select
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec

from llmserve.kvstore.transfer import calls
from llmserve.kvstore.transfer.base import Region, TransferEngine
from llmserve.kvstore.transfer.express import Express
from llmserve.kvstore.transfer.fetches import Fetches, Job
from llmserve.kvstore.transfer.ladder import Rung
from llmserve.kvstore.transfer.orders import Ends, Fetch, Fetched
from llmserve.kvstore.transfer.pacing import TokenBucket
from llmserve.kvstore.transfer.peers import Peers
from llmserve.kvstore.transfer.probes import Probes
from llmserve.kvstore.transfer.pushes import Pushes
from llmserve.kvstore.transfer.runs import size_of

logger = logging.getLogger(__name__)

_IDLE_S = 1.0
_WATCH_ACTIVE_S = 0.002
_ACTIVE_FOR_S = 2.0
_POLL_S = 0.0002

_T = TypeVar("_T")


class Mover:
    """The engines of one rank behind one thread."""

    def __init__(
        self,
        engines: Sequence[TransferEngine],
        bucket: TokenBucket,
        *,
        probe: Region | None = None,
        probe_piece_bytes: int = 64 << 10,
        owner: object = None,
        express: TransferEngine | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``probe``: memory for probes, registered already, kept alive by ``owner``; without it none are made.
        ``probe_piece_bytes``: the runs that pages come in.

        ``express``: an engine for the owner's thread, see ``Express``; of host memory it only makes loads, since a
        copy would hold that thread up for nothing.

        ``clock``: by which transfers are measured, stall and cool down.
        """
        self._engines = {engine.name: engine for engine in engines}
        self._bucket = bucket
        self._clock = clock
        self._owner = owner
        self.ends = Ends(
            uuid.uuid4().hex,
            {name: engine.describe() for name, engine in self._engines.items()},
            probe.address if probe else 0,
            probe.size_bytes if probe else 0,
            probe.place.gpu if probe else None,
        )
        self._peers = Peers(self._engines)
        self._fetches = Fetches(self._engines, self._peers, self.ends, clock)
        self._pushes = Pushes(self._engines, self._peers)
        self._probes = Probes(probe, self._peers, bucket, probe_piece_bytes)
        self._orders: deque[Fetch | tuple[Ends, bytes]] = deque()
        self._notes: deque[bytes] = deque()
        self._waiting: deque[Job] = deque()
        self._under_way = 0
        self._active_s = -math.inf
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self._closing = False
        self._express = Express(express, self._order, lambda size: bucket.take(size, clock())) if express else None
        self._thread = threading.Thread(target=self._run, name="page-mover", daemon=True)
        self._thread.start()

    # -- the owner's --------------------------------------------------------------------------------------------

    def fetch(self, fetch: Fetch) -> None:
        """Order pages; the end of it comes from ``take_ended``."""
        self._under_way += 1
        if self._express is None or fetch.local.gpu is None or not self._express.fetch(fetch):
            self._order(fetch)

    def load(self, fetch: Fetch) -> bool:
        """Start a fetch that the device's work from now on waits for; False: it cannot be done."""
        return self._express is not None and self._express.load(fetch)

    def finish_loads(self) -> list[Fetched]:
        """Wait for the end of all loads."""
        return self._express.finish_loads() if self._express is not None else []

    def notify(self, ends: Ends, message: bytes) -> None:
        """Send a message by any engine; it may be lost with the peer."""
        self._order((ends, message))

    def _order(self, order: Fetch | tuple[Ends, bytes]) -> None:
        self._orders.append(order)
        os.eventfd_write(self._wake_fd, 1)

    def take_ended(self) -> list[Fetched]:
        ended = _drain(self._fetches.ended)
        if self._express is not None:
            ended += self._express.take_ended()
        self._under_way -= len(ended)
        return ended

    def take_notes(self) -> list[bytes]:
        """Messages of peers."""
        return _drain(self._notes)

    @property
    def under_way(self) -> int:
        """Fetches ordered whose end was not taken yet."""
        return self._under_way

    def rates(self, ends: Ends) -> dict[Rung, float]:
        """Measured bytes a second to that peer."""
        return self._peers.rates(ends.mover)

    def close(self) -> None:
        """Cancel everything and close the engines; never raises."""
        if self._closing:
            return
        self._closing = True
        os.eventfd_write(self._wake_fd, 1)
        self._thread.join()
        if self._express is not None:
            self._express.close()
        for engine in self._engines.values():
            engine.close()
        os.close(self._wake_fd)

    # -- the thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closing:
            try:
                self._wait(self._step(self._clock()))
            except Exception:
                logger.exception("page mover: an error that nobody expected; it goes on")
                time.sleep(0.1)
        self._fetches.close()

    def _wait(self, wait_s: float) -> None:
        fds = [self._wake_fd, *(fd for engine in self._engines.values() for fd in engine.wake_fds())]
        poller = select.poll()
        for fd in fds:
            poller.register(fd, select.POLLIN)
        if wait_s >= 0.001:
            ready = poller.poll(wait_s * 1000)
        else:
            ready = poller.poll(0)
            if not ready:
                time.sleep(wait_s)
        if any(fd == self._wake_fd for fd, _ in ready):
            os.eventfd_read(self._wake_fd)

    def _step(self, now_s: float) -> float:
        """Do what can be done; how long to sleep if nothing happens."""
        self._take_orders(now_s)
        for name, engine in self._engines.items():
            for message in engine.notifications():
                self._active_s = now_s
                self._hear(name, message)
        self._pushes.advance()
        self._start_waiting(now_s)
        self._fetches.advance()
        idle = not (self._fetches or self._waiting or self._pushes)
        if idle and (job := self._probes.next(now_s)) is not None:
            self._fetches.begin(job, now_s)
        return self._pause_s(now_s)

    def _pause_s(self, now_s: float) -> float:
        if self._orders or self._closing:
            return 0.0
        if self._fetches or self._pushes or any(engine.busy for engine in self._engines.values()):
            self._active_s = now_s
            return _POLL_S
        if self._waiting:
            return max(_POLL_S, min(self._bucket.wait_s(now_s), _WATCH_ACTIVE_S))
        watch_s = min((engine.watch_s for engine in self._engines.values() if engine.watch_s), default=_IDLE_S)
        return min(watch_s, _WATCH_ACTIVE_S) if now_s - self._active_s < _ACTIVE_FOR_S else watch_s

    def _take_orders(self, now_s: float) -> None:
        for order in _drain(self._orders):
            self._active_s = now_s
            if isinstance(order, Fetch):
                peer = self._peers.of(order.ends)
                peer.wanted = True
                self._waiting.append(Job(order, peer, size_of(order.runs)))
            else:
                self._peers.say(self._peers.of(order[0]), calls.Note(order[1]))

    def _start_waiting(self, now_s: float) -> None:
        while self._waiting:
            job = self._waiting[0]
            if now_s < job.fetch.expires_s and not self._bucket.take(job.size_bytes, now_s):
                return
            self._waiting.popleft()
            self._fetches.begin(job, now_s)

    def _hear(self, engine: str, data: bytes) -> None:
        try:
            call = calls.decode(data)
        except msgspec.MsgspecError:
            logger.warning("a peer sent %d bytes by %s that are no message", len(data), engine)
            return
        match call:
            case calls.Note(note):
                self._notes.append(note)
            case calls.Pushed():
                self._fetches.heard(call)
            case calls.Stop():
                self._pushes.stop(call)
            case calls.Ask():
                self._pushes.begin(call)


def _drain(queue: deque[_T]) -> list[_T]:
    items: list[_T] = []
    while queue:
        items.append(queue.popleft())
    return items
