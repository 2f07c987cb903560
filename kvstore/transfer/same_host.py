"""Between processes of one host: the kernel copies host memory (``cma``), a GPU kernel copies GPU memory (CUDA IPC).

Nothing of the transfer involves the peer, which may compute or be stopped meanwhile. Messages travel through datagram
sockets; what they carry is checked against a key that only the description tells.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import sys
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from llmserve.kvstore.transfer.base import (
    Description,
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
from llmserve.kvstore.transfer.cma import IOVECS, CrossMemory
from llmserve.kvstore.transfer.runs import (
    as_array,
    check_inside,
    chunks,
    local_pieces,
    remote_pieces,
    table_of,
)

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    from llmserve.kvstore.transfer.cuda_ipc import CudaCopier, CudaCopy, IpcRegion

logger = logging.getLogger(__name__)

_KEY_BYTES = 16
_INLINE_BYTES = 65536
"""Less is copied at once by the caller: a thread would take longer to wake up."""
_CHUNK_BYTES = 8 << 20
"""Between two looks at whether the transfer is still wanted."""
_MESSAGE_BYTES = 65536


def available() -> str | None:
    """None, or why this engine cannot be used here."""
    if sys.platform != "linux":
        return f"needs Linux, this is {sys.platform}"
    try:
        CrossMemory()
        os.close(os.pidfd_open(os.getpid()))
    except (OSError, AttributeError) as error:
        return f"the kernel does not offer what it needs: {error}"
    return None


def host_identity() -> str:
    """Equal for processes that see each other's process ids, and for no others."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


class _Description(msgspec.Struct, frozen=True, array_like=True):
    host: str
    pid: int
    started: str
    """Field 22 of ``/proc/<pid>/stat``: tells a process from a later one of the same id."""
    socket: bytes
    """Abstract address of the datagram socket."""
    key: bytes
    secret: bytes
    """What lies at ``probe``: reading it proves that this end may read the peer."""
    probe: int
    regions: list[tuple[int, int, int]]
    """Address, size, GPU (-1: none)."""
    ipc: bytes
    """Encoded handles of the regions on GPUs; empty without."""


@dataclass(slots=True)
class _Peer:
    said: _Description
    pidfd: int
    regions: list[Region]
    ipc: list[IpcRegion]

    def gone(self) -> bool:
        return bool(select.select([self.pidfd], [], [], 0)[0])


@dataclass(slots=True)
class _Copy(Handle):
    """A copy by the kernel of the operating system."""

    peer: _Peer
    chunks: deque[tuple[NDArray[numpy.uint64], NDArray[numpy.uint64]]]
    write: bool
    bytes_moved: int
    state: Progress = Progress.RUNNING
    running: bool = False
    cancelled: bool = False


@dataclass(slots=True)
class _GpuCopy(Handle):
    peer: _Peer
    copy: CudaCopy
    bytes_moved: int


@dataclass(slots=True)
class _Worker:
    """A thread that copies, transfer by transfer."""

    memory: CrossMemory
    queue: deque[_Copy] = field(default_factory=deque)
    wake: threading.Condition = field(default_factory=threading.Condition)
    closing: bool = False
    thread: threading.Thread | None = None
    done_fd: int = -1
    """An eventfd that tells the caller that something ended."""

    def submit(self, copy: _Copy) -> None:
        if self.thread is None:
            self.thread = threading.Thread(target=self._run, name="same-host-copy", daemon=True)
            self.thread.start()
        with self.wake:
            self.queue.append(copy)
            self.wake.notify()

    def _run(self) -> None:
        while True:
            with self.wake:
                while not self.queue and not self.closing:
                    self.wake.wait()
                if self.closing:
                    return
                copy = self.queue.popleft()
            self.run(copy)
            os.eventfd_write(self.done_fd, 1)

    def run(self, copy: _Copy) -> None:
        while True:
            with self.wake:
                if copy.cancelled or self.closing:
                    copy.state, copy.running = Progress.FAILED, False
                    return
                if not copy.chunks:
                    copy.state, copy.running = Progress.DONE, False
                    return
                copy.running = True
                local, remote = copy.chunks.popleft()
            try:
                if copy.peer.gone():
                    raise OSError("the process is gone")
                for at in range(0, len(local), IOVECS):
                    self.memory.copy(
                        copy.peer.said.pid, local[at : at + IOVECS], remote[at : at + IOVECS], write=copy.write
                    )
            except OSError as error:
                logger.warning("a copy of %d bytes failed: %s", copy.bytes_moved, error)
                with self.wake:
                    copy.state, copy.running = Progress.FAILED, False
                return

    def cancel(self, copy: _Copy) -> bool:
        with self.wake:
            copy.cancelled = True
            return not copy.running

    def close(self) -> None:
        with self.wake:
            self.closing = True
            self.wake.notify()
        if self.thread is not None:
            self.thread.join()


class SameHostEngine(TransferEngine):
    """Reads and writes the memory of other processes of this user on this machine."""

    name = "same_host"

    def __init__(self, options: EngineOptions) -> None:
        """Raises ``TransferError``."""
        try:
            self._memory = CrossMemory()
        except OSError as error:
            raise TransferError(str(error)) from error
        import numpy

        self._memory.permit()
        self.fingerprint = options.fingerprint
        self._gpu: CudaCopier | None = None
        if options.gpu is not None:
            from llmserve.kvstore.transfer.cuda_ipc import CudaCopier

            self._gpu = CudaCopier(options.gpu)
        self._key, self._secret = os.urandom(_KEY_BYTES), numpy.frombuffer(os.urandom(_KEY_BYTES), dtype=numpy.uint8)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.bind(b"\0llmserve-" + os.urandom(8).hex().encode())
        self._regions: list[Region] = []
        self._peers: dict[str, _Peer] = {}
        self._done_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self._worker = _Worker(self._memory, done_fd=self._done_fd)

    def register(self, regions: Sequence[Region]) -> None:
        if self._gpu is not None:
            self._gpu.register([region for region in regions if region.place.gpu is not None])
        elif any(region.place.gpu is not None for region in regions):
            raise TransferError("this engine was opened for host memory")
        self._regions.extend(regions)

    def _describe(self) -> bytes:
        said = _Description(
            host=host_identity(),
            pid=os.getpid(),
            started=_started(os.getpid()),
            socket=self._socket.getsockname(),
            key=self._key,
            secret=self._secret.tobytes(),
            probe=int(self._secret.ctypes.data),
            regions=[(r.address, r.size_bytes, -1 if r.place.gpu is None else r.place.gpu) for r in self._regions],
            ipc=self._gpu.describe() if self._gpu is not None else b"",
        )
        return msgspec.msgpack.encode(said)

    def may_reach(self, description: bytes) -> bool:
        try:
            payload = msgspec.msgpack.decode(description, type=Description).payload
            return msgspec.msgpack.decode(payload, type=_Description).host == host_identity()
        except msgspec.MsgspecError:
            return False

    def _connect(self, payload: bytes) -> str:
        try:
            said = msgspec.msgpack.decode(payload, type=_Description)
        except msgspec.MsgspecError as error:
            raise TransferError(f"not a description: {error}") from error
        if said.host != host_identity():
            raise TransferError("the peer is on another host, or in another process namespace")
        try:
            pidfd = os.pidfd_open(said.pid)
        except OSError as error:
            raise PeerGone(f"process {said.pid} is gone: {error}") from error
        try:
            self._prove(said)
            ipc = self._gpu.open(said.ipc) if self._gpu is not None and said.ipc else []
        except BaseException:
            os.close(pidfd)
            raise
        name = f"{said.pid}/{said.key.hex()[:8]}"
        self.forget(name)
        regions = [Region(a, size, Place(None if gpu < 0 else gpu)) for a, size, gpu in said.regions]
        self._peers[name] = _Peer(said, pidfd, regions, ipc)
        return name

    def _prove(self, said: _Description) -> None:
        """That it is the process that described itself, and that its memory may be read."""
        import numpy

        if _started(said.pid) != said.started:
            raise PeerGone(f"process {said.pid} is another one by now")
        found = numpy.zeros(len(said.secret), dtype=numpy.uint8)
        here, there = [(int(found.ctypes.data), found.nbytes)], [(said.probe, found.nbytes)]
        try:
            self._memory.copy(said.pid, as_array(here), as_array(there))
        except OSError as error:
            raise TransferError(f"the memory of process {said.pid} cannot be read: {error}") from error
        if found.tobytes() != said.secret:
            raise TransferError(f"process {said.pid} is not the one that described itself")

    def forget(self, peer: str) -> None:
        known = self._peers.pop(peer, None)
        if known is None:
            return
        os.close(known.pidfd)
        if self._gpu is not None:
            self._gpu.close_regions(known.ipc)

    def pull(self, peer: str, runs: Sequence[Run], local: Place, remote: Place) -> Handle:
        return self._start(peer, runs, local, remote, write=False)

    def push(self, peer: str, runs: Sequence[Run], local: Place, remote: Place) -> Handle:
        return self._start(peer, runs, local, remote, write=True)

    def _start(self, peer: str, runs: Sequence[Run], local: Place, remote: Place, *, write: bool) -> Handle:
        known = self._known(peer)
        if (local.gpu is None) != (remote.gpu is None):
            raise TransferError("host memory on one side and GPU memory on the other")
        table = table_of(runs)
        here, there = local_pieces(table), remote_pieces(table)
        check_inside(here, [r for r in self._regions if (r.place.gpu is None) == (local.gpu is None)])
        check_inside(there, [r for r in known.regions if (r.place.gpu is None) == (remote.gpu is None)])
        size_bytes = int(here[:, 1].sum())
        if local.gpu is not None:
            assert self._gpu is not None
            return _GpuCopy(known, self._gpu.start(known.ipc, here, there, write=write), size_bytes)
        parts = deque((local_pieces(part), remote_pieces(part)) for part in chunks(table, _CHUNK_BYTES))
        copy = _Copy(known, parts, write, size_bytes)
        if size_bytes <= _INLINE_BYTES:
            self._worker.run(copy)
        else:
            self._worker.submit(copy)
        return copy

    def _known(self, peer: str) -> _Peer:
        known = self._peers.get(peer)
        if known is None:
            raise TransferError(f"{peer} is not connected")
        if known.gone():
            raise PeerGone(f"process {known.said.pid} is gone")
        return known

    def poll(self, handle: Handle) -> Progress:
        if isinstance(handle, _GpuCopy):
            assert self._gpu is not None
            return self._gpu.poll(handle.copy)
        assert isinstance(handle, _Copy)
        return handle.state

    def release(self, handle: Handle) -> bool:
        if isinstance(handle, _GpuCopy):
            # A kernel that runs cannot be called back.
            return self.poll(handle) is not Progress.RUNNING
        assert isinstance(handle, _Copy)
        return self._worker.cancel(handle)

    def notify(self, peer: str, message: bytes) -> None:
        known = self._known(peer)
        try:
            self._socket.sendto(known.said.key + message, known.said.socket)
        except (ConnectionRefusedError, ConnectionResetError) as error:
            raise PeerGone(f"process {known.said.pid} does not listen any more: {error}") from error
        except OSError as error:
            raise TransferError(f"process {known.said.pid} cannot be notified: {error}") from error

    def notifications(self) -> list[bytes]:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._done_fd)
        received: list[bytes] = []
        while True:
            try:
                message = self._socket.recv(_KEY_BYTES + _MESSAGE_BYTES)
            except (BlockingIOError, OSError):
                return received
            if message[:_KEY_BYTES] == self._key:
                received.append(message[_KEY_BYTES:])
            else:
                logger.warning("a message of %d bytes without the key is dropped", len(message))

    def order_after(self, mark: object) -> None:
        if self._gpu is not None:
            self._gpu.order_after(mark)

    def settle(self, mark: object) -> None:
        if self._gpu is not None:
            self._gpu.settle(mark)

    def reachable(self, peer: str) -> bool:
        known = self._peers.get(peer)
        return known is not None and not known.gone()

    def wake_fds(self) -> Sequence[int]:
        return self._socket.fileno(), self._done_fd

    def close(self) -> None:
        self._worker.close()
        for peer in list(self._peers):
            self.forget(peer)
        if self._gpu is not None:
            self._gpu.close()
        self._socket.close()
        os.close(self._done_fd)


def _started(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError) as error:
        raise PeerGone(f"process {pid} is gone: {error}") from error
