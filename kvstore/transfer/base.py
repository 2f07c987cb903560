"""Page movers behind one interface: registered memory, described to peers, pulled or pushed in runs of bytes."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass


class TransferError(Exception):
    """Memory could not be registered, a peer not be reached, or a transfer not be started."""


class PeerGone(TransferError):
    """The peer does not answer any more; connect anew before the next transfer."""


class Progress(enum.Enum):
    """State of one transfer."""

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Place:
    """Where memory lies: the host's (``gpu`` None), or that of one GPU."""

    gpu: int | None = None


@dataclass(frozen=True, slots=True)
class Region:
    """Memory to be registered as one piece."""

    address: int
    size_bytes: int
    place: Place


@dataclass(frozen=True, slots=True)
class Run:
    """Contiguous bytes here and there."""

    local: int
    """Address in this process."""
    remote: int
    """Address in the peer."""
    size_bytes: int


class Handle(ABC):
    """A transfer under way; belongs to the engine that made it."""

    bytes_moved: int


class TransferEngine(ABC):
    """One transport, for one thread of one process. Nothing here blocks for longer than a connection set-up."""

    name: str
    """As in the manifest's ``transfer.engine_order``."""

    @abstractmethod
    def register(self, regions: Sequence[Region]) -> None:
        """Make memory reachable for peers that connect later. Raises ``TransferError``."""

    @abstractmethod
    def describe(self) -> bytes:
        """What a peer needs to connect: the address of this end and all memory registered so far."""

    @abstractmethod
    def connect(self, description: bytes) -> str:
        """Name of the peer that described itself so; again after it was forgotten. Raises ``TransferError``."""

    @abstractmethod
    def forget(self, peer: str) -> None:
        """Drop a peer that is gone; unknown ones are ignored."""

    @abstractmethod
    def pull(self, peer: str, runs: Sequence[Run], local: Place, remote: Place) -> Handle:
        """Start to read the peer's bytes. Raises ``TransferError``, ``PeerGone``."""

    @abstractmethod
    def push(self, peer: str, runs: Sequence[Run], local: Place, remote: Place) -> Handle:
        """Start to write into the peer's memory. Raises ``TransferError``, ``PeerGone``."""

    @abstractmethod
    def poll(self, handle: Handle) -> Progress:
        """Where the transfer stands; never raises."""

    @abstractmethod
    def release(self, handle: Handle) -> bool:
        """Free a handle, cancelling what still runs. False: it cannot be cancelled yet, so local memory may still
        be written to; ask again later."""

    @abstractmethod
    def notify(self, peer: str, message: bytes) -> None:
        """Send a short message, in order with earlier ones. Raises ``TransferError``, ``PeerGone``."""

    @abstractmethod
    def notifications(self) -> list[bytes]:
        """Messages from peers since the last call; also drives transports without a thread of their own."""

    @abstractmethod
    def close(self) -> None:
        """Deregister everything; never raises."""
