"""Between processes of one host: the kernel copies host memory (``cma``), a GPU kernel copies GPU memory (CUDA IPC).

Nothing of the transfer involves the peer, which may compute or be stopped meanwhile. Messages travel through datagram
sockets; what they carry is checked against a key that only the description tells.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
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
from llmserve.kvstore.transfer.cma import CrossMemory
from llmserve.kvstore.transfer.host_copy import CopyThread, HostCopy
from llmserve.kvstore.transfer.host_description import HostDescription
from llmserve.kvstore.transfer.processes import Process, host_identity, started
from llmserve.kvstore.transfer.runs import as_array, check_inside, chunks, local_pieces, remote_pieces, table_of

if TYPE_CHECKING:
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


@dataclass(slots=True)
class _Peer:
    said: HostDescription
    process: Process
    regions: list[Region]
    ipc: list[IpcRegion]


@dataclass(slots=True)
class _GpuCopy(Handle):
    peer: _Peer
    copy: CudaCopy
    bytes_moved: int


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
        self._worker = CopyThread(self._memory, done_fd=self._done_fd)

    def register(self, regions: Sequence[Region]) -> None:
        if self._gpu is not None:
            self._gpu.register([region for region in regions if region.place.gpu is not None])
        elif any(region.place.gpu is not None for region in regions):
            raise TransferError("this engine was opened for host memory")
        self._regions.extend(regions)

    def _describe(self) -> bytes:
        said = HostDescription(
            host=host_identity(),
            pid=os.getpid(),
            started=started(os.getpid()),
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
            return msgspec.msgpack.decode(payload, type=HostDescription).host == host_identity()
        except msgspec.MsgspecError:
            return False

    def _connect(self, payload: bytes) -> str:
        try:
            said = msgspec.msgpack.decode(payload, type=HostDescription)
        except msgspec.MsgspecError as error:
            raise TransferError(f"not a description: {error}") from error
        if said.host != host_identity():
            raise TransferError("the peer is on another host, or in another process namespace")
        process = Process.open(said.pid)
        try:
            self._prove(said)
            ipc = self._gpu.open(said.ipc) if self._gpu is not None and said.ipc else []
        except BaseException:
            process.close()
            raise
        name = f"{said.pid}/{said.key.hex()[:8]}"
        self.forget(name)
        regions = [Region(a, size, Place(None if gpu < 0 else gpu)) for a, size, gpu in said.regions]
        self._peers[name] = _Peer(said, process, regions, ipc)
        return name

    def _prove(self, said: HostDescription) -> None:
        """That it is the process that described itself, and that its memory may be read."""
        import numpy

        if started(said.pid) != said.started:
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
        known.process.close()
        if self._gpu is not None:
            self._gpu.close_regions(known.ipc)

    def pull(self, peer: str, runs: Sequence[Run], local: Place, remote: Place) -> Handle:
        return self._start(peer, runs, local, remote, write=False)

    def peek(self, peer: str, run: Run) -> None:
        """Read some bytes of the peer's host memory here and now. Raises ``TransferError``, ``PeerGone``."""
        known = self._known(peer)
        here, there = as_array([(run.local, run.size_bytes)]), as_array([(run.remote, run.size_bytes)])
        check_inside(there, [r for r in known.regions if r.place.gpu is None])
        try:
            self._memory.copy(known.said.pid, here, there)
        except OSError as error:
            raise PeerGone(f"the memory of process {known.said.pid} cannot be read: {error}") from error

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
        copy = HostCopy(known.process, parts, write, size_bytes)
        if size_bytes <= _INLINE_BYTES:
            self._worker.run(copy)
        else:
            self._worker.submit(copy)
        return copy

    def _known(self, peer: str) -> _Peer:
        known = self._peers.get(peer)
        if known is None:
            raise TransferError(f"{peer} is not connected")
        if known.process.gone():
            raise PeerGone(f"process {known.said.pid} is gone")
        return known

    def poll(self, handle: Handle) -> Progress:
        if isinstance(handle, _GpuCopy):
            assert self._gpu is not None
            return self._gpu.poll(handle.copy)
        assert isinstance(handle, HostCopy)
        return handle.state

    def release(self, handle: Handle) -> bool:
        if isinstance(handle, _GpuCopy):
            # A kernel that runs cannot be called back.
            return self.poll(handle) is not Progress.RUNNING
        assert isinstance(handle, HostCopy)
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

    def hold_up(self, handle: Handle) -> None:
        if isinstance(handle, _GpuCopy) and self._gpu is not None:
            self._gpu.hold_up(handle.copy)
        else:
            self.finish(handle)

    def finish(self, handle: Handle) -> None:
        if isinstance(handle, _GpuCopy):
            self.settle(handle.copy.launched.event)
        elif isinstance(handle, HostCopy):
            self._worker.finish(handle)

    def settle(self, mark: object) -> None:
        if self._gpu is not None:
            self._gpu.settle(mark)

    def reachable(self, peer: str) -> bool:
        known = self._peers.get(peer)
        return known is not None and not known.process.gone()

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
