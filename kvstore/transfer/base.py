"""Page movers behind one interface: registered memory, described to peers, pulled or pushed in runs of bytes."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

VERSION = 2
"""Of the engines' descriptions and of what they tell each other."""


class TransferError(Exception):
    """Memory could not be registered, a peer not be reached, or a transfer not be started."""


class PeerGone(TransferError):
    """The peer does not answer any more; connect anew before the next transfer."""


class FingerprintMismatch(TransferError):
    """The peer's memory holds something else: nothing of it may be read."""


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


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How to open an engine."""

    gpu: int | None = None
    """Device index of the memory that pages lie in; None: the host's."""
    fingerprint: str = ""
    """Names what the registered memory holds; peers of another one are refused."""
    host: str = "127.0.0.1"
    """Address at which peers reach this end, for engines that connect over TCP."""
    nixl_backend_policy: str = "auto"
    ucx_rdma: bool = True


class Description(msgspec.Struct, frozen=True, array_like=True):
    """What an engine says of itself to its peers."""

    version: int
    engine: str
    fingerprint: str
    payload: bytes
    """The engine's own."""


class Handle(ABC):
    """A transfer under way; belongs to the engine that made it."""

    bytes_moved: int


class TransferEngine(ABC):
    """One transport, for one thread of one process. Nothing here blocks for longer than a connection set-up."""

    name: str
    """As in the manifest's ``transfer.engine_order``, and ``same_host`` or ``gloo``."""
    fingerprint: str = ""
    watch_s: float | None = None
    """How often ``notifications`` has to be called while nothing is under way; None: ``wake_fds`` tell."""

    @abstractmethod
    def register(self, regions: Sequence[Region]) -> None:
        """Make memory reachable for peers that connect later. Raises ``TransferError``."""

    def describe(self) -> bytes:
        """What a peer needs to connect: the address of this end and all memory registered so far."""
        return msgspec.msgpack.encode(Description(VERSION, self.name, self.fingerprint, self._describe()))

    def connect(self, description: bytes) -> str:
        """Name of the peer that described itself so; again after it was forgotten.

        Raises ``TransferError``, and ``FingerprintMismatch`` before anything is sent.
        """
        try:
            said = msgspec.msgpack.decode(description, type=Description)
        except msgspec.MsgspecError as error:
            raise TransferError(f"{self.name}: not a description: {error}") from error
        if (said.version, said.engine) != (VERSION, self.name):
            raise TransferError(
                f"the peer is {said.engine} version {said.version}, this end {self.name} version {VERSION}"
            )
        if said.fingerprint != self.fingerprint:
            raise FingerprintMismatch(f"the peer holds {said.fingerprint!r}, this end {self.fingerprint!r}")
        return self._connect(said.payload)

    def may_reach(self, description: bytes) -> bool:
        """False: it is certain without asking that the end that described itself so cannot be connected."""
        return True

    @abstractmethod
    def _describe(self) -> bytes: ...

    @abstractmethod
    def _connect(self, payload: bytes) -> str: ...

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

    @property
    def busy(self) -> bool:
        """Whether peers wait for this end: ``notifications`` should be called often."""
        return False

    def order_after(self, mark: object) -> None:  # noqa: B027
        """The next pull begins on the device only after what ``mark``, of the owner's device, stands for."""

    def hold_up(self, handle: Handle) -> None:  # noqa: B027
        """What the owner's device is given from now on begins only after that pull has ended."""

    def finish(self, handle: Handle) -> None:  # noqa: B027
        """Wait for the end of that pull, which nothing but the device is needed for."""

    def settle(self, mark: object) -> None:  # noqa: B027
        """Wait until what ``mark`` stands for has happened."""

    def reachable(self, peer: str) -> bool:
        """False: the peer is gone for certain and writes nothing more."""
        return True

    def wake_fds(self) -> Sequence[int]:
        """File descriptors that become readable when ``notifications`` has something to do; may change with it."""
        return ()

    @abstractmethod
    def close(self) -> None:
        """Deregister everything; never raises."""
