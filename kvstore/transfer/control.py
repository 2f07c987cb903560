"""Framed messages between two engines over TCP, without blocking; a connection's end is its peer's death."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from collections import deque

from llmserve.kvstore.transfer.base import PeerGone, TransferError

_LENGTH = struct.Struct("<I")
_CONNECT_S = 3.0
_READ_BYTES = 1 << 18
_FRAME_BYTES = 1 << 26
"""More is no frame of ours."""


class Connection:
    """One end of a connection to a peer."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = sock
        self._unsent: deque[memoryview] = deque()
        self._received = bytearray()
        self.open = True

    @classmethod
    def to(cls, host: str, port: int) -> Connection:
        """Raises ``PeerGone``, ``TransferError``."""
        try:
            return cls(socket.create_connection((host, port), timeout=_CONNECT_S))
        except ConnectionRefusedError as error:
            raise PeerGone(f"{host}:{port} does not listen any more") from error
        except OSError as error:
            raise TransferError(f"{host}:{port} cannot be reached: {error}") from error

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, frame: bytes) -> None:
        """Queue a frame and send what the socket takes now. Raises ``PeerGone``."""
        if not self.open:
            raise PeerGone("the connection is closed")
        self._unsent.append(memoryview(_LENGTH.pack(len(frame)) + frame))
        self.flush()

    def flush(self) -> None:
        while self.open and self._unsent:
            try:
                sent = self._socket.send(self._unsent[0])
            except BlockingIOError:
                return
            except OSError:
                self.close()
                return
            rest = self._unsent[0][sent:]
            if rest:
                self._unsent[0] = rest
            else:
                self._unsent.popleft()

    def receive(self) -> list[bytes]:
        """All whole frames that are here; ``open`` is false once the peer has closed."""
        while self.open:
            try:
                data = self._socket.recv(_READ_BYTES)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.EINTR:
                    self.close()
                continue
            if not data:
                self.close()
            self._received += data
        return self._frames()

    def _frames(self) -> list[bytes]:
        frames: list[bytes] = []
        at = 0
        while len(self._received) - at >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._received, at)
            if size > _FRAME_BYTES:
                self.close()
                break
            end = at + _LENGTH.size + size
            if len(self._received) < end:
                break
            frames.append(bytes(self._received[at + _LENGTH.size : end]))
            at = end
        del self._received[:at]
        return frames

    def close(self) -> None:
        if self.open:
            self.open = False
            self._socket.close()


class Listener:
    """Where peers connect."""

    def __init__(self, host: str) -> None:
        """Raises ``TransferError``."""
        try:
            self._socket = socket.create_server((host, 0))
        except OSError as error:
            raise TransferError(f"cannot listen on {host}: {error}") from error
        self._socket.setblocking(False)
        self.port: int = self._socket.getsockname()[1]

    def fileno(self) -> int:
        return self._socket.fileno()

    def accept(self) -> list[Connection]:
        connections: list[Connection] = []
        while True:
            try:
                sock, _ = self._socket.accept()
            except (BlockingIOError, OSError):
                return connections
            connections.append(Connection(sock))

    def close(self) -> None:
        self._socket.close()
