"""What workers tell their node's kv manager about pages: datagrams on a socket beside the pages.

They are hints and may be lost: the manager lists what is there from time to time. A worker never waits for it.
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
import itertools
import os
import socket
import tempfile
from collections import deque
from pathlib import Path

import msgspec


class NoticeKind(enum.StrEnum):
    """What happened to a page."""

    STORED = "stored"
    USED = "used"
    REMOVED = "removed"


class Notice(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One page, one event."""

    kind: NoticeKind
    tier: str
    """Name of the storage class."""
    path: str
    size_bytes: int = 0
    parent: bytes = b""
    """With ``STORED``: the hash of the block before it in its prefix, if known."""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[Notice])
_LONGEST = 100
"""Bytes of a socket's path: the system allows 107."""
_BUFFER_BYTES = 4 * 2**20
_WAITING = 20_000
_BATCH = 200
"""Notices of one datagram."""


def socket_path(place: str) -> Path:
    """Where the manager of a node listens for news of pages at ``place`` (a folder, or a bucket's name)."""
    path = Path(place) / ".manager"
    if os.path.isabs(place) and len(os.fsencode(path)) <= _LONGEST:
        return path
    return Path(tempfile.gettempdir()) / f"llmserve-kv-{hashlib.sha256(place.encode()).hexdigest()[:16]}"


class Notifier:
    """Sends notices to the manager at ``path``, if there is one; forgets them if there is none, or too many."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._waiting: deque[Notice] = deque(maxlen=_WAITING)

    def add(self, notice: Notice) -> None:
        self._waiting.append(notice)

    def flush(self) -> None:
        """Send what waits, as far as the manager keeps up; to be called a few times a second."""
        while self._waiting:
            batch = list(itertools.islice(self._waiting, _BATCH))
            try:
                self._socket.sendto(_encoder.encode(batch), self._path)
            except BlockingIOError:
                return
            except OSError:
                self._waiting.clear()
                return
            for _ in batch:
                self._waiting.popleft()

    def close(self) -> None:
        self.flush()
        self._socket.close()


class Listener:
    """The manager's end: a readable socket, and what arrived on it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
        self.socket.bind(str(path))
        path.chmod(0o600)

    def take(self) -> list[Notice]:
        """All notices that are there; what is none is ignored."""
        taken: list[Notice] = []
        while True:
            try:
                data = self.socket.recv(65536)
            except BlockingIOError:
                return taken
            with contextlib.suppress(msgspec.MsgspecError):
                taken.extend(_decoder.decode(data))

    def close(self) -> None:
        self.socket.close()
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
