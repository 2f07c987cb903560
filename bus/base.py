"""The bus as the rest of the project sees it. ``NatsBus`` is the real one, ``MemoryBus`` the seam for tests."""

from __future__ import annotations

import asyncio
import math
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import msgspec

from llmserve.bus.messages import AnyMessage, Message, Request, Result
from llmserve.bus.subjects import Subjects

Handler = Callable[[AnyMessage], None]
"""Called from the read loop for every message of a subscription, in order; it must not block or raise."""


class BusError(Exception):
    """The bus could not do what was asked."""


class QueueFull(BusError):
    """The tenant's queue holds as many requests as the manifest allows."""


class Overtaken(BusError):
    """Another router took the leadership first."""


class BusUnavailable(BusError):
    """No answer from the server in time; the operation may or may not have happened."""


class StoredRequest(msgspec.Struct, frozen=True):
    """A request as it stands on the stream."""

    seq: int
    tenant: str
    klass: str
    request: Request
    data: bytes
    """The encoded request, to be passed on in a grant without encoding it again."""


@dataclass(frozen=True, slots=True)
class StreamContents:
    """Which requests were on the stream at one moment."""

    last_seq: int
    """Of all requests that were ever stored; later ones are not covered."""
    seqs: frozenset[int]


class Subscription(ABC):
    """A running subscription."""

    @abstractmethod
    async def unsubscribe(self) -> None: ...


class Follower(Subscription):
    """A running view of the request stream; survives reconnects and gaps by itself."""

    @abstractmethod
    async def caught_up(self) -> None:
        """Return once every request that was stored when the follower started has been handled."""


class Bus(ABC):
    """One connection of one member to the deployment's bus."""

    subjects: Subjects

    @property
    @abstractmethod
    def closed(self) -> bool:
        """Whether ``close`` was called."""

    @property
    def reconnected_s(self) -> float:
        """When the bus was last back after it was away, by ``time.monotonic``; minus infinity if it never was."""
        return -math.inf

    @abstractmethod
    def publish(self, subject: str, message: Message, *, no_responders: Callable[[], None] | None = None) -> None:
        """Send over core NATS, at most once, in order, without waiting.

        ``no_responders`` is called if the server says that nobody subscribes to ``subject``.
        """

    @abstractmethod
    async def subscribe(self, subject: str, handler: Handler) -> Subscription:
        """Call ``handler`` for every message on ``subject``; bytes that are no message are logged and counted."""

    @abstractmethod
    async def accept(self, request: Request, tenant: str, klass: str) -> int:
        """Store the request durably and return its sequence: from here on it cannot be lost.

        ``klass``: for a later attempt ``subjects.again`` of its class, whose queue first attempts cannot fill. Waits
        for the server through a restart of at most ``publish_patience_s`` (a setting of the connection). Raises
        ``QueueFull`` or ``BusUnavailable``.
        """

    @abstractmethod
    async def fetch(self, seq: int) -> StoredRequest | None:
        """The stored request, or None if it is finished. Raises ``BusUnavailable``."""

    @abstractmethod
    async def discard(self, seq: int) -> bool:
        """Take a request off the stream; False if it was gone already. Raises ``BusUnavailable``."""

    @abstractmethod
    async def finish(self, seq: int, tenant: str, result: Result) -> bool:
        """Record the result, once, then take the request off the stream; True if this call recorded it.

        Retries until it is done; raises ``BusUnavailable`` only when the connection is closed.
        """

    @abstractmethod
    async def follow(self, handler: Callable[[StoredRequest], None]) -> Follower:
        """Call ``handler`` for every request on the stream, from the oldest on, in order of sequence."""

    @abstractmethod
    async def contents(self) -> StreamContents:
        """What is on the request stream now, by sequence. Raises ``BusUnavailable``."""

    @abstractmethod
    async def lead(self, router: str, over: int | None = None) -> int:
        """Take the leadership of the deployment's routers; returns the new epoch, higher than any before.

        ``over``: only from the leader of that epoch (0: if there was none yet). Raises ``Overtaken`` if another
        router leads by now.
        """

    @abstractmethod
    async def leader(self) -> tuple[str, int]:
        """(router, epoch) of the current leader; ``("", 0)`` if there was none yet."""

    @abstractmethod
    def on_reconnect(self, callback: Callable[[], Awaitable[None]]) -> Callable[[], None]:
        """Run ``callback`` after every reconnect, until what is returned is called."""

    def defer(self, work: Callable[[], None]) -> None:
        """Call ``work`` soon: from a handler, once the messages that were received together have been handled."""
        asyncio.get_running_loop().call_soon(work)

    @abstractmethod
    async def round_trip_s(self) -> float:
        """Seconds of one ping to the server and back. Raises ``BusUnavailable``."""

    @abstractmethod
    async def flush(self) -> None:
        """Return once everything published so far has reached the server. Raises ``BusUnavailable``."""

    @abstractmethod
    async def close(self) -> None:
        """Flush and disconnect; never raises."""
