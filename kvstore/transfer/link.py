"""One connection of a staged engine: transfers in both directions, chunk by chunk through staging buffers."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from llmserve.kvstore.transfer import lane as wire
from llmserve.kvstore.transfer.base import Handle, Progress, TransferError
from llmserve.kvstore.transfer.control import Connection
from llmserve.kvstore.transfer.lane import Lane, Op
from llmserve.kvstore.transfer.runs import scatter_bytes, total_bytes
from llmserve.kvstore.transfer.staging import HostStaging, Slot, Staging

_DRAIN_S = 2.0
"""A peer that does not send what it was granted of a transfer given up is cut off then."""
_LOOK_S = 0.2
"""What passes between two looks beyond this is not the peer's fault."""


@dataclass(slots=True)
class Staged(Handle):
    """A transfer that this end began."""

    link: Link
    id: int
    bytes_moved: int
    state: Progress = Progress.RUNNING


@dataclass(slots=True)
class Incoming:
    """Bytes on their way to pages of this end."""

    chunks: list[list[tuple[int, int]]]
    gpu: bool
    handle: Staged | None
    """None: the peer pushes."""
    granted: int = 0
    landed: int = 0
    given_up_s: float | None = None


@dataclass(slots=True)
class Outgoing:
    """Bytes on their way to the peer."""

    chunks: deque[list[tuple[int, int]]]
    gpu: bool
    handle: Staged | None
    """None: the peer pulls."""


@dataclass(slots=True)
class _Posted:
    op: Op
    slot: Slot
    staging: Staging
    id: int = -1
    chunk: int = -1


class Stagings:
    """Rings of buffers by place and direction, made at their first use."""

    def __init__(self, gpu: Callable[[], Staging] | None) -> None:
        """``gpu`` makes those of the GPU, where there is one."""
        self._gpu = gpu
        self._rings: dict[tuple[bool, bool], Staging] = {}

    def of(self, *, gpu: bool, sending: bool) -> Staging:
        gpu = gpu and self._gpu is not None
        ring = self._rings.get((gpu, sending))
        if ring is None:
            ring = self._rings[gpu, sending] = self._gpu() if gpu and self._gpu is not None else HostStaging()
        return ring


@dataclass(slots=True, eq=False)
class Link:
    """A connection to one peer."""

    connection: Connection
    stagings: Stagings
    dialled: bool
    name: str = ""
    lane: Lane | None = None
    incoming: dict[int, Incoming] = field(default_factory=dict)
    outgoing: dict[int, Outgoing] = field(default_factory=dict)
    grants: deque[wire.Grant] = field(default_factory=deque)
    _receiving: list[_Posted] = field(default_factory=list)
    _sending: list[_Posted] = field(default_factory=list)
    _transfers: int = 0
    _tags: int = 0
    _looked_s: float = field(default_factory=time.monotonic)

    def new_id(self) -> int:
        self._transfers += 1
        return 2 * self._transfers + (not self.dialled)

    def say(self, message: wire.AnyMessage) -> None:
        """Raises ``PeerGone``."""
        self.connection.send(wire.encode(message))

    def busy(self) -> bool:
        return bool(self.incoming or self.outgoing or self.grants or self._receiving or self._sending)

    # -- ends ---------------------------------------------------------------------------------------------------

    def sent(self, ident: int) -> None:
        """The receiver has everything."""
        _settle(self.outgoing.pop(ident, None), Progress.DONE)

    def refused(self, ident: int) -> None:
        """The peer says that it failed."""
        _settle(self.outgoing.pop(ident, None), Progress.FAILED)
        if incoming := self.incoming.get(ident):
            _settle(incoming, Progress.FAILED)
            self._stop(ident, incoming)

    def give_up(self, ident: int) -> None:
        """Nobody waits for that transfer any more."""
        incoming, outgoing = self.incoming.get(ident), self.outgoing.pop(ident, None)
        if incoming is not None:
            self._stop(ident, incoming)
        if outgoing is not None:
            outgoing.handle = None
        if (incoming or outgoing) and self.connection.open:
            self.say(wire.Failed(ident, "given up"))

    def _stop(self, ident: int, incoming: Incoming) -> None:
        incoming.given_up_s, incoming.handle = time.monotonic(), None
        self._finish_given_up(ident, incoming)

    def _finish_given_up(self, ident: int, incoming: Incoming) -> None:
        """Forget it once all that was granted is here; an inline answer finds nobody."""
        if incoming.granted == incoming.landed or not any(posted.id == ident for posted in self._receiving):
            self.incoming.pop(ident, None)

    def close(self) -> list[Callable[[], bool]]:
        """Fail everything. Buffers that the transport may still write to live on in what is returned: each tells
        whether it is through with its own."""
        self.connection.close()
        for incoming in self.incoming.values():
            _settle(incoming, Progress.FAILED)
        for outgoing in self.outgoing.values():
            _settle(outgoing, Progress.FAILED)
        self.incoming.clear()
        self.outgoing.clear()
        if self.lane is not None:
            self.lane.close()
        posted = [*self._receiving, *self._sending]
        for one in posted:
            one.staging.abandon()
        return [partial(_through, one) for one in posted]

    # -- progress -----------------------------------------------------------------------------------------------

    def landed_inline(self, ident: int, data: bytes) -> None:
        """Raises ``TransferError`` if it is not what was asked for."""
        incoming = self.incoming.pop(ident, None)
        if incoming is None or incoming.handle is None:
            return
        (spans,) = incoming.chunks
        if len(data) != total_bytes(spans):
            raise TransferError(f"{len(data)} bytes came, {total_bytes(spans)} were asked for")
        scatter_bytes(data, spans)
        incoming.handle.state = Progress.DONE

    def advance(self) -> None:
        """Grant, send, and take what has landed. Raises ``TransferError``: the link is of no use any more."""
        if self.lane is None or not self.connection.open or not self.lane.ready():
            return
        self._grant(self.lane)
        self._send(self.lane)
        self._land()
        now_s = time.monotonic()
        unseen_s, self._looked_s = max(0.0, now_s - self._looked_s - _LOOK_S), now_s
        for incoming in self.incoming.values():
            if incoming.given_up_s is None:
                continue
            incoming.given_up_s += unseen_s
            if now_s - incoming.given_up_s > _DRAIN_S:
                raise TransferError(f"it has not sent what it was granted within {_DRAIN_S:g} s")

    def _grant(self, lane: Lane) -> None:
        for ident, incoming in self.incoming.items():
            staging = self.stagings.of(gpu=incoming.gpu, sending=False)
            while incoming.given_up_s is None and incoming.granted < len(incoming.chunks):
                slot = staging.take()
                if slot is None:
                    return
                size_bytes = total_bytes(incoming.chunks[incoming.granted])
                op = lane.receive(slot, size_bytes, self._tags)
                self._receiving.append(_Posted(op, slot, staging, ident, incoming.granted))
                self.say(wire.Grant(ident, self._tags, size_bytes))
                self._tags += 1
                incoming.granted += 1

    def _send(self, lane: Lane) -> None:
        sent = [posted for posted in self._sending if posted.op.done()]
        for posted in sent:
            self._sending.remove(posted)
            posted.staging.give(posted.slot)
        while self.grants:
            grant = self.grants[0]
            outgoing = self.outgoing.get(grant.id)
            staging = self.stagings.of(gpu=outgoing is None or outgoing.gpu, sending=True)
            slot = staging.take()
            if slot is None:
                return
            if outgoing is not None and outgoing.chunks:
                spans = outgoing.chunks.popleft()
                if total_bytes(spans) != grant.size_bytes:
                    raise TransferError(f"it grants {grant.size_bytes} bytes, the chunk has {total_bytes(spans)}")
                staging.gather(spans, slot)
                if not outgoing.chunks and outgoing.handle is None:
                    del self.outgoing[grant.id]
            self.grants.popleft()
            op = lane.send(slot, min(grant.size_bytes, slot.size_bytes), grant.tag)
            self._sending.append(_Posted(op, slot, staging))

    def _land(self) -> None:
        landed = [posted for posted in self._receiving if posted.op.done()]
        for posted in landed:
            self._receiving.remove(posted)
            incoming = self.incoming[posted.id]
            incoming.landed += 1
            if incoming.given_up_s is None:
                posted.staging.scatter(posted.slot, incoming.chunks[posted.chunk])
            posted.staging.give(posted.slot)
            if incoming.given_up_s is not None:
                self._finish_given_up(posted.id, incoming)
            elif incoming.landed == len(incoming.chunks):
                del self.incoming[posted.id]
                _settle(incoming, Progress.DONE)
                if incoming.handle is None:
                    self.say(wire.Done(posted.id))


def _settle(transfer: Incoming | Outgoing | None, state: Progress) -> None:
    if transfer is not None and transfer.handle is not None:
        transfer.handle.state = state


def _through(posted: _Posted) -> bool:
    try:
        return posted.op.done()
    except TransferError:
        return True
