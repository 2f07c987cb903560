"""A thread that moves pages: it owns the engines, chooses among them by the ladder, probes, retries and serves peers.

The owner orders fetches and takes what ended; nothing here makes it wait. A peer's engines are driven by its own
mover, so that pages can be read while their owner computes.

A push is ordered by the end that wants the pages: it asks the other one to write, and hears when that is done. Until
then its pages may be written to, which is why a push that stalls only ends when the peer says so or is gone.
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
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import msgspec

from llmserve.kvstore.transfer.base import (
    FingerprintMismatch,
    Handle,
    PeerGone,
    Place,
    Progress,
    Region,
    Run,
    TransferEngine,
    TransferError,
)
from llmserve.kvstore.transfer.ladder import Ladder, Rung, rungs
from llmserve.kvstore.transfer.pacing import TokenBucket
from llmserve.kvstore.transfer.runs import RunTable, size_of

if TYPE_CHECKING:
    from llmserve.kvstore.transfer.express import Express

logger = logging.getLogger(__name__)

_HOST = Place()
_IDLE_S = 1.0
_WATCH_ACTIVE_S = 0.002
_ACTIVE_FOR_S = 2.0
_POLL_S = 0.0002
_PATIENCE_MIN_S = 0.2
_STALL_PART = 0.25
"""Of the deadline: an attempt that has taken so much, and four times what it should, has stalled."""
_PROBE_S = 2.0


class Ends(msgspec.Struct, frozen=True, array_like=True):
    """What a mover says of itself to its peers."""

    mover: str
    """Unique per incarnation."""
    engines: dict[str, bytes]
    """Description of each."""
    probe: int = 0
    """Address of the memory that probes read and write."""
    probe_bytes: int = 0
    probe_gpu: int | None = None


class _Ask(msgspec.Struct, frozen=True, tag="ask", array_like=True):
    """Push these to me."""

    id: int
    ends: Ends
    engine: str
    runs: bytes
    """int64 of shape (runs, 3): your address, mine, size."""
    mine: int | None
    """GPU of my memory."""
    yours: int | None


class _Pushed(msgspec.Struct, frozen=True, tag="pushed", array_like=True):
    mover: str
    id: int
    ok: bool
    reason: str = ""


class _Stop(msgspec.Struct, frozen=True, tag="stop", array_like=True):
    """I do not wait for that push any more: tell me when it is off."""

    mover: str
    id: int


class _Note(msgspec.Struct, frozen=True, tag="note", array_like=True):
    data: bytes


_T = TypeVar("_T")
_Message = _Ask | _Pushed | _Stop | _Note
_decoder = msgspec.msgpack.Decoder(_Message)


@dataclass(frozen=True, slots=True)
class Fetch:
    """Pages wanted by the owner: ``runs``, then ``fence``, which lies in host memory on both sides."""

    id: str
    ends: Ends
    runs: Sequence[Run]
    local: Place
    remote: Place
    fence: Run | None
    timeout_s: float
    """For all attempts together, from the first one on."""
    expires_s: float = math.inf
    """Monotonic time after which no attempt begins: the lease is nearly over."""
    after: object = None
    """For ``TransferEngine.order_after``."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try on one rung; ``failure`` as in ``Transfer``."""

    rung: Rung
    bytes_moved: int
    seconds: float
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Fetched:
    """The end of a fetch; the last attempt decided it."""

    id: str
    failure: str
    attempts: list[Attempt]


@dataclass(slots=True)
class _Peer:
    ends: Ends
    engines: list[str]
    """Those that both ends have and that may reach it."""
    ladder: Ladder
    names: dict[str, str] = field(default_factory=dict)
    """Engine -> its name for the peer, of those that are connected."""
    wanted: bool = False
    """Pages were fetched from it: worth a probe."""


@dataclass(slots=True)
class _Job:
    fetch: Fetch
    peer: _Peer
    size_bytes: int
    begun_s: float
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


@dataclass(slots=True)
class _Serving:
    """A push for a peer."""

    ask: _Ask
    peer: _Peer
    engine: TransferEngine
    handle: Handle
    stopped: bool = False


class Mover:
    """The engines of one rank behind one thread."""

    def __init__(
        self,
        engines: Sequence[TransferEngine],
        bucket: TokenBucket,
        *,
        probe: Region | None = None,
        owner: object = None,
        express: TransferEngine | None = None,
    ) -> None:
        """``probe``: memory for probes, registered already, kept alive by ``owner``; without it none are made.

        ``express``: an engine for the owner's thread, see ``Express``.
        """
        self._engines = {engine.name: engine for engine in engines}
        self._bucket = bucket
        self._probe, self._owner = probe, owner
        self.ends = Ends(
            uuid.uuid4().hex,
            {name: engine.describe() for name, engine in self._engines.items()},
            probe.address if probe else 0,
            probe.size_bytes if probe else 0,
            probe.place.gpu if probe else None,
        )
        self._peers: dict[str, _Peer] = {}
        self._orders: deque[Fetch | tuple[Ends, bytes]] = deque()
        self._ended: deque[Fetched] = deque()
        self._notes: deque[bytes] = deque()
        self._waiting: deque[_Job] = deque()
        self._jobs: list[_Job] = []
        self._serving: list[_Serving] = []
        self._pushed: dict[int, _Pushed] = {}
        self._push_ids = 0
        self._under_way = 0
        self._active_s = -math.inf
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self._closing = False
        self._express: Express | None = None
        if express is not None:
            from llmserve.kvstore.transfer.express import Express

            self._express = Express(express, self._order, lambda size: bucket.take(size, time.monotonic()))
        self._thread = threading.Thread(target=self._run, name="page-mover", daemon=True)
        self._thread.start()

    # -- the owner's --------------------------------------------------------------------------------------------

    def fetch(self, fetch: Fetch) -> None:
        """Order pages; the end of it comes from ``take_ended``."""
        self._under_way += 1
        if self._express is None or not self._express.fetch(fetch):
            self._order(fetch)

    def notify(self, ends: Ends, message: bytes) -> None:
        """Send a message by any engine; it may be lost with the peer."""
        self._order((ends, message))

    def _order(self, order: Fetch | tuple[Ends, bytes]) -> None:
        self._orders.append(order)
        os.eventfd_write(self._wake_fd, 1)

    def take_ended(self) -> list[Fetched]:
        ended = _drain(self._ended)
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
        peer = self._peers.get(ends.mover)
        return peer.ladder.rates() if peer is not None else {}

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
                self._wait(self._step(time.monotonic()))
            except Exception:
                logger.exception("page mover: an error that nobody expected; it goes on")
                time.sleep(0.1)
        for job in self._jobs:
            if job.handle is not None and job.rung is not None:
                self._engines[job.rung.engine].release(job.handle)

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
        self._serving = [serving for serving in self._serving if not self._served(serving)]
        self._start_waiting(now_s)
        self._jobs = [job for job in self._jobs if not self._advanced(job)]
        if not (self._jobs or self._waiting or self._serving):
            self._start_probes(now_s)
        return self._pause_s(now_s)

    def _pause_s(self, now_s: float) -> float:
        if self._orders or self._closing:
            return 0.0
        if self._jobs or self._serving or any(engine.busy for engine in self._engines.values()):
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
                size_bytes = size_of(order.runs)
                peer = self._peer(order.ends)
                peer.wanted = True
                self._waiting.append(_Job(order, peer, size_bytes, now_s))
            else:
                self._say(self._peer(order[0]), _Note(order[1]))

    def _peer(self, ends: Ends) -> _Peer:
        peer = self._peers.get(ends.mover)
        if peer is None:
            said = ends.engines
            common = [n for n, engine in self._engines.items() if n in said and engine.may_reach(said[n])]
            peer = self._peers[ends.mover] = _Peer(ends, common, Ladder(rungs(common)))
        return peer

    def _start_waiting(self, now_s: float) -> None:
        while self._waiting:
            job = self._waiting[0]
            if now_s < job.fetch.expires_s and not self._bucket.take(job.size_bytes, now_s):
                return
            self._waiting.popleft()
            job.begun_s = now_s
            if self._attempt(job, now_s):
                self._jobs.append(job)

    # -- one attempt --------------------------------------------------------------------------------------------

    def _attempt(self, job: _Job, now_s: float) -> bool:
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

    def _submit(self, job: _Job, rung: Rung) -> None:
        import numpy

        engine, fetch = self._engines[rung.engine], job.fetch
        if rung.direction == "pull":
            name = self._connected(job.peer, rung.engine)
            engine.order_after(fetch.after)
            job.handle = engine.pull(name, fetch.runs, fetch.local, fetch.remote)
            return
        self._push_ids += 1
        job.push_id, job.handle = self._push_ids, None
        engine.settle(fetch.after)
        runs = numpy.array([(r.remote, r.local, r.size_bytes) for r in fetch.runs], dtype=numpy.int64).tobytes()
        ask = _Ask(job.push_id, self.ends, rung.engine, runs, fetch.local.gpu, fetch.remote.gpu)
        if not self._say(job.peer, ask):
            raise PeerGone("the peer cannot be asked")

    def _connected(self, peer: _Peer, engine: str) -> str:
        """The engine's name for the peer. Raises ``TransferError``."""
        if engine not in peer.names:
            peer.names[engine] = self._engines[engine].connect(peer.ends.engines[engine])
        return peer.names[engine]

    def _failed(self, job: _Job, kind: str, why: str) -> None:
        rung = job.rung
        assert rung is not None
        now_s = time.monotonic()
        wait_s = job.peer.ladder.failed(rung, now_s)
        job.attempts.append(Attempt(rung, 0, now_s - job.started_s, kind))
        log = logger.info if job.probe else logger.warning
        log("%s by %s failed (%s): %s; not used for %g s", job.fetch.id, rung, kind, why, wait_s)
        if kind == "peer" and (name := job.peer.names.pop(rung.engine, None)):
            self._engines[rung.engine].forget(name)

    def _advanced(self, job: _Job) -> bool:
        """Whether the fetch has ended, by an error that nobody expected too."""
        try:
            return self._advance(job, time.monotonic())
        except Exception:
            logger.exception("fetch %s by %s", job.fetch.id, job.rung)
            if job.stopping:
                # Whether its pages may still be written to is not known: it stays.
                return False
            job.stopping = "other"
            return False

    def _advance(self, job: _Job, now_s: float) -> bool:
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
            name = self._connected(job.peer, job.rung.engine)
            job.handle = self._engines[job.rung.engine].pull(name, [job.fetch.fence], _HOST, _HOST)
        except TransferError as error:
            self._failed(job, "peer", str(error))
            return not self._attempt(job, now_s)
        return self._advance(job, now_s)

    def _progress(self, job: _Job) -> Progress:
        assert job.rung is not None
        if job.handle is not None:
            return self._engines[job.rung.engine].poll(job.handle)
        pushed = self._pushed.pop(job.push_id, None)
        if pushed is None:
            return Progress.RUNNING
        if not pushed.ok:
            logger.info("%s: the peer could not push: %s", job.fetch.id, pushed.reason)
        return Progress.DONE if pushed.ok else Progress.FAILED

    def _patience_s(self, job: _Job) -> float:
        assert job.rung is not None
        left_s = job.begun_s + job.fetch.timeout_s - job.started_s
        if job.peer.ladder.choose(time.monotonic(), job.tried) is None:
            return left_s
        expected_s = job.peer.ladder.expected_s(job.rung, job.size_bytes) or 0.0
        return min(left_s, max(_PATIENCE_MIN_S, _STALL_PART * job.fetch.timeout_s, 4 * expected_s))

    def _give_up(self, job: _Job, kind: str, now_s: float) -> bool:
        job.stopping = kind
        return self._advance_stopping(job, now_s)

    def _advance_stopping(self, job: _Job, now_s: float) -> bool:
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

    def _is_off(self, job: _Job) -> bool:
        """Whether the attempt cannot write to the pages any more."""
        assert job.rung is not None
        engine = self._engines[job.rung.engine]
        if job.handle is not None:
            return engine.release(job.handle)
        if job.at_fence or job.stopping == "peer" or self._pushed.pop(job.push_id, None) is not None:
            return True
        if not job.stop_told:
            job.stop_told = True
            if not self._say(job.peer, _Stop(self.ends.mover, job.push_id)):
                return True
        names = job.peer.names
        return not any(self._engines[name].reachable(known) for name, known in names.items())

    def _succeed(self, job: _Job, now_s: float) -> bool:
        assert job.rung is not None
        seconds = now_s - job.started_s
        job.attempts.append(Attempt(job.rung, job.size_bytes, seconds))
        if job.probe is not None:
            job.peer.ladder.probed(job.rung, job.size_bytes, seconds)
        elif job.peer.ladder.moved(job.rung, job.size_bytes, seconds):
            logger.warning("%s has become slow: the pair is probed anew", job.rung)
        self._end(job, "")
        return True

    def _end(self, job: _Job, failure: str) -> None:
        if job.probe is None:
            self._ended.append(Fetched(job.fetch.id, failure, job.attempts))
        elif not job.peer.ladder.due(time.monotonic()):
            rates = ", ".join(f"{rung} {rate / 1e9:.2f} GB/s" for rung, rate in job.peer.ladder.rates().items())
            logger.info("transfer rates to %s: %s", job.peer.ends.mover[:8], rates)

    # -- probes -------------------------------------------------------------------------------------------------

    def _start_probes(self, now_s: float) -> None:
        """One at a time, so that none measures the other."""
        if self._probe is None:
            return
        for peer in self._peers.values():
            if not (peer.wanted and peer.names and peer.ends.probe_bytes):
                continue
            for rung in peer.ladder.due(now_s):
                if self._bucket.wait_s(now_s) > 0:
                    return
                job = self._probe_job(peer, rung, now_s)
                self._bucket.take(job.size_bytes, now_s)
                if self._attempt(job, now_s):
                    self._jobs.append(job)
                    return

    def _probe_job(self, peer: _Peer, rung: Rung, now_s: float) -> _Job:
        assert self._probe is not None
        size_bytes = min(self._probe.size_bytes, peer.ends.probe_bytes) // 2
        piece = max(1, min(PROBE_PIECE_BYTES, size_bytes))
        # Written to the second half: the peer may probe at the same time and reads the first.
        runs = [
            Run(self._probe.address + size_bytes + at, peer.ends.probe + at, min(piece, size_bytes - at))
            for at in range(0, size_bytes, piece)
        ]
        fetch = Fetch(
            f"probe of {peer.ends.mover[:8]}",
            peer.ends,
            runs,
            self._probe.place,
            Place(peer.ends.probe_gpu),
            None,
            _PROBE_S,
        )
        return _Job(fetch, peer, size_bytes, now_s, probe=rung)

    # -- peers --------------------------------------------------------------------------------------------------

    def _say(self, peer: _Peer, message: _Message) -> bool:
        """By the first engine that reaches the peer; False: none does."""
        for name in peer.engines:
            try:
                self._engines[name].notify(self._connected(peer, name), msgspec.msgpack.encode(message))
                return True
            except TransferError as error:
                logger.info("%s cannot notify %s: %s", name, peer.ends.mover[:8], error)
                if gone := peer.names.pop(name, None):
                    self._engines[name].forget(gone)
        logger.warning("mover %s hears nothing from this one any more", peer.ends.mover[:8])
        return False

    def _hear(self, engine: str, data: bytes) -> None:
        try:
            message = _decoder.decode(data)
        except msgspec.MsgspecError:
            logger.warning("a peer sent %d bytes by %s that are no message", len(data), engine)
            return
        match message:
            case _Note(note):
                self._notes.append(note)
            case _Pushed(mover, ident, _, _) if mover == self.ends.mover:
                if any(job.push_id == ident for job in self._jobs):
                    self._pushed[ident] = message
            case _Stop(mover, ident):
                for serving in self._serving:
                    if (serving.ask.ends.mover, serving.ask.id) == (mover, ident):
                        serving.stopped = True
            case _Ask():
                self._serve(message)

    def _serve(self, ask: _Ask) -> None:
        import numpy

        peer = self._peer(ask.ends)
        engine = self._engines.get(ask.engine)
        try:
            if engine is None or ask.engine not in peer.engines:
                raise TransferError(f"{ask.engine} is not open here")
            runs = RunTable(numpy.frombuffer(ask.runs, dtype=numpy.int64).reshape(-1, 3))
            handle = engine.push(self._connected(peer, ask.engine), runs, Place(ask.yours), Place(ask.mine))
        except TransferError as error:
            self._say(peer, _Pushed(ask.ends.mover, ask.id, False, str(error)))
            return
        self._serving.append(_Serving(ask, peer, engine, handle))

    def _served(self, serving: _Serving) -> bool:
        """Whether a push has ended; the peer is told so."""
        progress = serving.engine.poll(serving.handle)
        if progress is Progress.RUNNING and not serving.stopped:
            return False
        if not serving.engine.release(serving.handle):
            return False
        ok = progress is Progress.DONE
        self._say(serving.peer, _Pushed(serving.ask.ends.mover, serving.ask.id, ok, "" if ok else "the push failed"))
        return True


PROBE_PIECE_BYTES = 64 << 10
"""A page of one layer of an 8B model on a GPU; those of others are of this order."""


def _drain(queue: deque[_T]) -> list[_T]:
    items: list[_T] = []
    while queue:
        items.append(queue.popleft())
    return items
