"""Engines over transports that need both ends: requests over TCP, pages in staged chunks over a lane.

The receiver leads: it posts a buffer, grants it to the sender, and scatters what has landed. A transfer that it gives
up only stops being granted; what is still on its way lands in buffers of the engine, never in pages.
"""

from __future__ import annotations

import hmac
import logging
import os
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Sequence

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
from llmserve.kvstore.transfer.lane import Lane
from llmserve.kvstore.transfer.link import Incoming, Link, Outgoing, Staged, Stagings
from llmserve.kvstore.transfer.runs import (
    Spans,
    as_array,
    check_inside,
    cut,
    host_bytes,
    local_spans,
    remote_spans,
    size_of,
    total_bytes,
)
from llmserve.kvstore.transfer.staging import Staging, slot_bytes

logger = logging.getLogger(__name__)

_INLINE_BYTES = 16384


class _Description(msgspec.Struct, frozen=True, array_like=True):
    host: str
    port: int
    key: bytes
    name: str
    info: bytes


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
        self._peers: dict[str, Link] = {}
        self._links: list[Link] = []
        self._notes: list[bytes] = []
        self._stagings = Stagings(None if options.gpu is None else self._gpu_staging)
        self._abandoned: list[Callable[[], bool]] = []

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
        link = Link(Connection.to(said.host, said.port), self._stagings, dialled=True, name=said.name)
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
        handle = Staged(link, link.new_id(), size_bytes)
        inline = size_bytes <= _INLINE_BYTES and not gpu
        chunks = [spans] if inline else list(cut(spans, slot_bytes(gpu=gpu)))
        link.say(wire.Want(handle.id, remote_spans(runs), gpu, inline))
        link.incoming[handle.id] = Incoming(chunks, gpu, handle, granted=len(chunks) if inline else 0)
        link.advance()
        return handle

    def push(self, peer: str, runs: Sequence[Run], local: Place, remote: Place) -> Handle:
        link, gpu = self._start(peer, runs, local, remote)
        handle = Staged(link, link.new_id(), size_of(runs))
        link.say(wire.Offer(handle.id, remote_spans(runs), gpu))
        link.outgoing[handle.id] = Outgoing(deque(cut(local_spans(runs), slot_bytes(gpu=gpu))), gpu, handle)
        return handle

    def _start(self, peer: str, runs: Sequence[Run], local: Place, remote: Place) -> tuple[Link, bool]:
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
        assert isinstance(handle, Staged)
        if handle.state is Progress.RUNNING:
            self._progress()
        return handle.state

    def release(self, handle: Handle) -> bool:
        assert isinstance(handle, Staged)
        handle.link.give_up(handle.id)
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
        self._links.extend(Link(connection, self._stagings, dialled=False) for connection in self._listener.accept())
        self._drive()
        for link in list(self._links):
            try:
                link.connection.flush()
                for frame in link.connection.receive():
                    self._hear(link, wire.decode(frame))
                link.advance()
            except TransferError as error:
                logger.warning("%s: the connection to %s is given up: %s", self.name, link.name or "a peer", error)
                self._lose(link)
                continue
            if not link.connection.open:
                self._lose(link)
        self._abandoned = [through for through in self._abandoned if not through()]

    def _hear(self, link: Link, message: wire.AnyMessage) -> None:
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
                link.landed_inline(ident, data)
            case wire.Done(ident):
                link.sent(ident)
            case wire.Failed(ident, reason):
                logger.info("%s: %s says that transfer %d failed: %s", self.name, link.name, ident, reason)
                link.refused(ident)

    def _asked(self, link: Link, message: wire.Want | wire.Offer) -> None:
        try:
            self._check(message.spans, gpu=message.gpu)
            chunks = cut(message.spans, slot_bytes(gpu=message.gpu))
            if isinstance(message, wire.Offer):
                link.incoming[message.id] = Incoming(list(chunks), message.gpu, None)
            elif message.inline:
                if message.gpu or total_bytes(message.spans) > _INLINE_BYTES:
                    raise TransferError(f"{total_bytes(message.spans)} bytes do not go into a message")
                link.say(wire.Inline(message.id, host_bytes(message.spans)))
            else:
                link.outgoing[message.id] = Outgoing(deque(chunks), message.gpu, None)
        except PeerGone:
            raise
        except TransferError as error:
            link.say(wire.Failed(message.id, str(error)))

    def _lose(self, link: Link) -> None:
        if link not in self._links:
            return
        self._links.remove(link)
        # Its buffers are kept alive: the transport may write to them until it has noticed.
        self._abandoned.extend(link.close())
