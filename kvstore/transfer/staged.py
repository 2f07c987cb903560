"""Engines over transports that need both ends: requests over TCP, pages in staged chunks over a lane.

The receiver leads: it posts a buffer, grants it to the sender, and scatters what has landed. A transfer that it gives
up only stops being granted; what is still on its way lands in buffers of the engine, never in pages.
"""

from __future__ import annotations

import hmac
import logging
import os
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from llmserve.kvstore.transfer import lane as wire
from llmserve.kvstore.transfer.base import (
    EngineOptions,
    Handle,
    PeerGone,
    Place,
    Progress,
    Region,
    Run,
    TransferEngine,
    TransferError,
)
from llmserve.kvstore.transfer.control import Connection, Listener
from llmserve.kvstore.transfer.lane import Lane, Op
from llmserve.kvstore.transfer.runs import (
    Spans,
    as_array,
    check_inside,
    cut,
    host_bytes,
    local_spans,
    remote_spans,
    scatter_bytes,
    size_of,
    total_bytes,
)
from llmserve.kvstore.transfer.staging import SLOT_BYTES, HostStaging, Slot, Staging

logger = logging.getLogger(__name__)

_INLINE_BYTES = 16384
_DRAIN_S = 2.0
"""A peer that does not send what it was granted of a transfer given up is cut off then."""


class _Description(msgspec.Struct, frozen=True, array_like=True):
    host: str
    port: int
    key: bytes
    name: str
    info: bytes


@dataclass(slots=True)
class _Staged(Handle):
    link: _Link
    id: int
    bytes_moved: int
    state: Progress = Progress.RUNNING


@dataclass(slots=True)
class _Incoming:
    chunks: list[list[tuple[int, int]]]
    gpu: bool
    handle: _Staged | None
    """None: the peer pushes."""
    granted: int = 0
    landed: int = 0
    given_up_s: float | None = None


@dataclass(slots=True)
class _Outgoing:
    chunks: deque[list[tuple[int, int]]]
    gpu: bool
    handle: _Staged | None
    """None: the peer pulls."""


@dataclass(slots=True)
class _Posted:
    op: Op
    slot: Slot
    staging: Staging
    id: int = -1
    chunk: int = -1


@dataclass(slots=True)
class _Link:
    """A connection to one peer."""

    connection: Connection
    dialled: bool
    name: str = ""
    lane: Lane | None = None
    incoming: dict[int, _Incoming] = field(default_factory=dict)
    outgoing: dict[int, _Outgoing] = field(default_factory=dict)
    grants: deque[wire.Grant] = field(default_factory=deque)
    receiving: list[_Posted] = field(default_factory=list)
    sending: list[_Posted] = field(default_factory=list)
    transfers: int = 0
    tags: int = 0

    def new_id(self) -> int:
        self.transfers += 1
        return 2 * self.transfers + (not self.dialled)

    def say(self, message: wire.AnyMessage) -> None:
        self.connection.send(wire.encode(message))

    def busy(self) -> bool:
        return bool(self.incoming or self.outgoing or self.grants or self.receiving or self.sending)


class StagedEngine(TransferEngine):
    """What the two-ended engines have in common; a subclass opens the lanes."""

    def __init__(self, options: EngineOptions) -> None:
        """Raises ``TransferError``."""
        self.fingerprint = options.fingerprint
        self._host = options.host
        self._gpu = options.gpu
        self._listener = Listener(options.host)
        self._key = os.urandom(16)
        self._own_name = f"{options.host}:{self._listener.port}/{os.urandom(4).hex()}"
        self._regions: list[Region] = []
        self._peers: dict[str, _Link] = {}
        self._links: list[_Link] = []
        self._notes: list[bytes] = []
        self._stagings: dict[tuple[bool, bool], Staging] = {}
        self._abandoned: list[_Posted] = []

    # -- of the subclass ----------------------------------------------------------------------------------------

    @abstractmethod
    def _info(self) -> bytes:
        """What the lane of a peer needs to know of this end."""

    @abstractmethod
    def _open(self, lane_id: int, info: bytes, *, dialled: bool) -> Lane:
        """Begin to open a lane to the end that said ``info``. Raises ``TransferError``."""

    def _drive(self) -> None:
        """Let the transport proceed."""

    def _gpu_staging(self) -> Staging:
        from llmserve.kvstore.transfer.cuda_ipc import GpuStaging

        assert self._gpu is not None
        return GpuStaging(self._gpu)

    # -- interface ----------------------------------------------------------------------------------------------

    def register(self, regions: Sequence[Region]) -> None:
        if self._gpu is None and any(region.place.gpu is not None for region in regions):
            raise TransferError("this engine was opened for host memory")
        self._regions.extend(regions)

    def _describe(self) -> bytes:
        said = _Description(self._host, self._listener.port, self._key, self._own_name, self._info())
        return msgspec.msgpack.encode(said)

    def _connect(self, payload: bytes) -> str:
        try:
            said = msgspec.msgpack.decode(payload, type=_Description)
        except msgspec.MsgspecError as error:
            raise TransferError(f"not a description: {error}") from error
        self.forget(said.name)
        lane_id = int.from_bytes(os.urandom(4), "little")
        link = _Link(Connection.to(said.host, said.port), dialled=True, name=said.name)
        try:
            link.say(wire.Hello(said.key, self._own_name, lane_id, self._info()))
            link.lane = self._open(lane_id, said.info, dialled=True)
        except BaseException:
            link.connection.close()
            raise
        self._links.append(link)
        self._peers[said.name] = link
        return said.name

    def forget(self, peer: str) -> None:
        if link := self._peers.pop(peer, None):
            self._lose(link)

    def pull(self, peer: str, runs: Sequence[Run], local: Place, remote: Place) -> Handle:
        link, gpu = self._start(peer, runs, local, remote)
        spans, size_bytes = local_spans(runs), size_of(runs)
        handle = _Staged(link, link.new_id(), size_bytes)
        inline = size_bytes <= _INLINE_BYTES and not gpu
        chunks = [spans] if inline else list(cut(spans, SLOT_BYTES))
        link.say(wire.Want(handle.id, remote_spans(runs), gpu, inline))
        link.incoming[handle.id] = _Incoming(chunks, gpu, handle, granted=len(chunks) if inline else 0)
        self._advance(link)
        return handle

    def push(self, peer: str, runs: Sequence[Run], local: Place, remote: Place) -> Handle:
        link, gpu = self._start(peer, runs, local, remote)
        handle = _Staged(link, link.new_id(), size_of(runs))
        link.say(wire.Offer(handle.id, remote_spans(runs), gpu))
        link.outgoing[handle.id] = _Outgoing(deque(cut(local_spans(runs), SLOT_BYTES)), gpu, handle)
        return handle

    def _start(self, peer: str, runs: Sequence[Run], local: Place, remote: Place) -> tuple[_Link, bool]:
        link = self._peers.get(peer)
        if link is None:
            raise TransferError(f"{peer} is not connected")
        if not link.connection.open:
            raise PeerGone(f"{peer} has closed the connection")
        if (local.gpu is None) != (remote.gpu is None):
            raise TransferError("host memory on one side and GPU memory on the other")
        self._check(local_spans(runs), gpu=local.gpu is not None)
        return link, local.gpu is not None

    def _check(self, spans: Spans, *, gpu: bool) -> None:
        check_inside(as_array(spans), [r for r in self._regions if (r.place.gpu is not None) == gpu])

    def poll(self, handle: Handle) -> Progress:
        assert isinstance(handle, _Staged)
        if handle.state is Progress.RUNNING:
            self._progress()
        return handle.state

    def release(self, handle: Handle) -> bool:
        assert isinstance(handle, _Staged)
        link = handle.link
        if incoming := link.incoming.get(handle.id):
            incoming.given_up_s = time.monotonic()
            incoming.handle = None
            self._finish_given_up(link, handle.id, incoming)
            if link.connection.open:
                link.say(wire.Failed(handle.id, "given up"))
        if outgoing := link.outgoing.pop(handle.id, None):
            outgoing.handle = None
            if link.connection.open:
                link.say(wire.Failed(handle.id, "given up"))
        handle.state = Progress.FAILED if handle.state is Progress.RUNNING else handle.state
        return True

    def notify(self, peer: str, message: bytes) -> None:
        link = self._peers.get(peer)
        if link is None:
            raise TransferError(f"{peer} is not connected")
        link.say(wire.Note(message))

    def notifications(self) -> list[bytes]:
        self._progress()
        notes, self._notes = self._notes, []
        return notes

    def wake_fds(self) -> Sequence[int]:
        return [self._listener.fileno(), *(link.connection.fileno() for link in self._links if link.connection.open)]

    @property
    def busy(self) -> bool:
        """Whether a transfer of either end is under way: ``notifications`` should be called often."""
        return any(link.busy() for link in self._links)

    def reachable(self, peer: str) -> bool:
        link = self._peers.get(peer)
        return link is not None and link.connection.open

    def close(self) -> None:
        for link in list(self._links):
            self._lose(link)
        self._listener.close()

    # -- progress -----------------------------------------------------------------------------------------------

    def _progress(self) -> None:
        self._links.extend(_Link(connection, dialled=False) for connection in self._listener.accept())
        self._drive()
        for link in list(self._links):
            try:
                link.connection.flush()
                for frame in link.connection.receive():
                    self._hear(link, wire.decode(frame))
                self._advance(link)
            except TransferError as error:
                logger.warning("%s: the connection to %s is given up: %s", self.name, link.name or "a peer", error)
                self._lose(link)
                continue
            if not link.connection.open:
                self._lose(link)
        self._abandoned = [posted for posted in self._abandoned if not self._recover(posted)]

    def _hear(self, link: _Link, message: wire.AnyMessage) -> None:
        if isinstance(message, wire.Hello):
            if link.lane is not None or not hmac.compare_digest(message.key, self._key):
                raise TransferError("a stranger knocked")
            link.name = message.name
            link.lane = self._open(message.lane_id, message.info, dialled=False)
            return
        if link.lane is None:
            raise TransferError("a stranger knocked")
        match message:
            case wire.Note(data):
                self._notes.append(data)
            case wire.Want() | wire.Offer():
                self._asked(link, message)
            case wire.Grant():
                link.grants.append(message)
            case wire.Inline(ident, data):
                self._landed_inline(link, ident, data)
            case wire.Done(ident):
                self._settle(link.outgoing.pop(ident, None), Progress.DONE)
            case wire.Failed(ident, reason):
                logger.info("%s: %s says that transfer %d failed: %s", self.name, link.name, ident, reason)
                self._settle(link.outgoing.pop(ident, None), Progress.FAILED)
                if incoming := link.incoming.get(ident):
                    self._settle(incoming, Progress.FAILED)
                    incoming.given_up_s, incoming.handle = time.monotonic(), None
                    self._finish_given_up(link, ident, incoming)

    @staticmethod
    def _settle(transfer: _Incoming | _Outgoing | None, state: Progress) -> None:
        if transfer is not None and transfer.handle is not None:
            transfer.handle.state = state

    def _asked(self, link: _Link, message: wire.Want | wire.Offer) -> None:
        try:
            self._check(message.spans, gpu=message.gpu)
            if isinstance(message, wire.Offer):
                chunks = list(cut(message.spans, SLOT_BYTES))
                link.incoming[message.id] = _Incoming(chunks, message.gpu, None)
            elif message.inline:
                if message.gpu or total_bytes(message.spans) > _INLINE_BYTES:
                    raise TransferError(f"{total_bytes(message.spans)} bytes do not go into a message")
                link.say(wire.Inline(message.id, host_bytes(message.spans)))
            else:
                link.outgoing[message.id] = _Outgoing(deque(cut(message.spans, SLOT_BYTES)), message.gpu, None)
        except PeerGone:
            raise
        except TransferError as error:
            link.say(wire.Failed(message.id, str(error)))

    def _landed_inline(self, link: _Link, ident: int, data: bytes) -> None:
        incoming = link.incoming.pop(ident, None)
        if incoming is None or incoming.handle is None:
            return
        (spans,) = incoming.chunks
        if len(data) != total_bytes(spans):
            raise TransferError(f"{len(data)} bytes came, {total_bytes(spans)} were asked for")
        scatter_bytes(data, spans)
        incoming.handle.state = Progress.DONE

    def _advance(self, link: _Link) -> None:
        if link.lane is None or not link.connection.open or not link.lane.ready():
            return
        self._grant(link, link.lane)
        self._send(link, link.lane)
        self._land(link)
        now_s = time.monotonic()
        for incoming in link.incoming.values():
            if incoming.given_up_s is not None and now_s - incoming.given_up_s > _DRAIN_S:
                raise TransferError(f"it has not sent what it was granted within {_DRAIN_S:g} s")

    def _grant(self, link: _Link, lane: Lane) -> None:
        for ident, incoming in link.incoming.items():
            staging = self._staging(gpu=incoming.gpu, sending=False)
            while incoming.given_up_s is None and incoming.granted < len(incoming.chunks):
                slot = staging.take()
                if slot is None:
                    return
                size_bytes = total_bytes(incoming.chunks[incoming.granted])
                op = lane.receive(slot, size_bytes, link.tags)
                link.receiving.append(_Posted(op, slot, staging, ident, incoming.granted))
                link.say(wire.Grant(ident, link.tags, size_bytes))
                link.tags += 1
                incoming.granted += 1

    def _send(self, link: _Link, lane: Lane) -> None:
        sent = [posted for posted in link.sending if posted.op.done()]
        for posted in sent:
            link.sending.remove(posted)
            posted.staging.give(posted.slot)
        while link.grants:
            grant = link.grants[0]
            outgoing = link.outgoing.get(grant.id)
            staging = self._staging(gpu=self._gpu is not None and (outgoing is None or outgoing.gpu), sending=True)
            slot = staging.take()
            if slot is None:
                return
            if outgoing is not None and outgoing.chunks:
                spans = outgoing.chunks.popleft()
                if total_bytes(spans) != grant.size_bytes:
                    raise TransferError(f"it grants {grant.size_bytes} bytes, the chunk has {total_bytes(spans)}")
                staging.gather(spans, slot)
                if not outgoing.chunks and outgoing.handle is None:
                    del link.outgoing[grant.id]
            link.grants.popleft()
            op = lane.send(slot, min(grant.size_bytes, SLOT_BYTES), grant.tag)
            link.sending.append(_Posted(op, slot, staging))

    def _land(self, link: _Link) -> None:
        landed = [posted for posted in link.receiving if posted.op.done()]
        for posted in landed:
            link.receiving.remove(posted)
            incoming = link.incoming[posted.id]
            incoming.landed += 1
            if incoming.given_up_s is None:
                posted.staging.scatter(posted.slot, incoming.chunks[posted.chunk])
            posted.staging.give(posted.slot)
            if incoming.given_up_s is not None:
                self._finish_given_up(link, posted.id, incoming)
            elif incoming.landed == len(incoming.chunks):
                del link.incoming[posted.id]
                self._settle(incoming, Progress.DONE)
                if incoming.handle is None:
                    link.say(wire.Done(posted.id))

    @staticmethod
    def _finish_given_up(link: _Link, ident: int, incoming: _Incoming) -> None:
        """Forget it once all that was granted is here; an inline answer finds nobody."""
        if incoming.granted == incoming.landed or not any(posted.id == ident for posted in link.receiving):
            link.incoming.pop(ident, None)

    def _staging(self, *, gpu: bool, sending: bool) -> Staging:
        staging = self._stagings.get((gpu, sending))
        if staging is None:
            staging = self._stagings[gpu, sending] = self._gpu_staging() if gpu else HostStaging()
        return staging

    def _lose(self, link: _Link) -> None:
        link.connection.close()
        for incoming in link.incoming.values():
            self._settle(incoming, Progress.FAILED)
        for outgoing in link.outgoing.values():
            self._settle(outgoing, Progress.FAILED)
        link.incoming.clear()
        link.outgoing.clear()
        if link.lane is not None:
            link.lane.close()
        for posted in [*link.receiving, *link.sending]:
            posted.staging.abandon()
        # Kept alive: the transport may write to them until it has noticed.
        self._abandoned.extend([*link.receiving, *link.sending])
        if link in self._links:
            self._links.remove(link)

    @staticmethod
    def _recover(posted: _Posted) -> bool:
        try:
            return posted.op.done()
        except TransferError:
            return True
