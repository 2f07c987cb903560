"""The bus inside one process, for tests: the semantics of ``NatsBus`` without a server.

Messages are encoded and decoded as on the wire, and delivered from the event loop, never from inside ``publish``.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import TypeVar

from llmserve.bus.base import (
    Bus,
    BusUnavailable,
    Follower,
    Handler,
    Overtaken,
    QueueFull,
    StoredRequest,
    StreamContents,
    Subscription,
)
from llmserve.bus.messages import Message, MessageError, Request, Result, decode, encode
from llmserve.bus.settings import BusCounters, BusSettings
from llmserve.bus.subjects import Subjects

logger = logging.getLogger(__name__)

T = TypeVar("T")


class MemoryBroker:
    """What the members of one deployment share; ``bus`` makes a member's connection."""

    def __init__(self, deployment: str = "test", settings: BusSettings | None = None) -> None:
        self.subjects = Subjects(deployment)
        self.settings = settings or BusSettings()
        self.requests: dict[int, StoredRequest] = {}
        """What is on the request stream, by sequence."""
        self.results: dict[str, Result] = {}
        """By subject."""
        self._queues: dict[int, str] = {}
        """The subject of each request, by sequence."""
        self._last_seq = 0
        self._accepted: dict[str, tuple[int, float]] = {}
        self._leader = ("", 0)
        self._subscriptions: dict[str, list[MemorySubscription]] = defaultdict(list)
        self._followers: list[MemoryFollower] = []

    def bus(self, member: str) -> MemoryBus:
        return MemoryBus(self, member)

    def inject(self, subject: str, data: bytes) -> bool:
        """Deliver any bytes to the subscribers of ``subject``; False if there are none."""
        subscriptions = list(self._subscriptions[subject])
        for subscription in subscriptions:
            asyncio.get_running_loop().call_soon(subscription.receive, data)
        return bool(subscriptions)

    def store(self, request: Request, tenant: str, klass: str) -> int:
        """As the request stream would. Raises ``QueueFull``."""
        key = f"{request.request_id}.{request.attempt}"
        seq, since_s = self._accepted.get(key, (0, 0.0))
        now = time.monotonic()
        if seq and now - since_s < self.settings.duplicate_window_s:
            return seq
        subject = self.subjects.request(klass, tenant)
        queued = sum(1 for seq in self.requests if self._queues.get(seq) == subject)
        if queued >= self.settings.queue_max_len:
            raise QueueFull(f"the queue of tenant {tenant} is full")
        self._last_seq += 1
        klass, tenant = self.subjects.parse_request(subject)
        stored = StoredRequest(self._last_seq, tenant, klass, request, encode(request))
        self._queues[stored.seq] = subject
        self.requests[stored.seq] = stored
        self._accepted[key] = (stored.seq, now)
        for follower in self._followers:
            follower.feed(stored)
        return stored.seq

    def record(self, tenant: str, result: Result) -> bool:
        """Create the result; False if there is another."""
        subject = self.subjects.result(tenant, result.request_id)
        return self.results.setdefault(subject, result) == result

    def contents(self) -> StreamContents:
        return StreamContents(self._last_seq, frozenset(self.requests))

    def lead(self, router: str, over: int | None = None) -> int:
        """Raises ``Overtaken``."""
        if over is not None and over != self._leader[1]:
            raise Overtaken(f"router {self._leader[0]!r} leads in epoch {self._leader[1]}")
        self._leader = (router, self._leader[1] + 1)
        return self._leader[1]

    def leader(self) -> tuple[str, int]:
        return self._leader

    def attach(self, subscription: MemorySubscription) -> None:
        self._subscriptions[subscription.subject].append(subscription)

    def attach_follower(self, follower: MemoryFollower) -> None:
        self._followers.append(follower)

    def detach(self, subscription: MemorySubscription | MemoryFollower) -> None:
        if isinstance(subscription, MemoryFollower):
            if subscription in self._followers:
                self._followers.remove(subscription)
        elif subscription in self._subscriptions[subscription.subject]:
            self._subscriptions[subscription.subject].remove(subscription)


class MemorySubscription(Subscription):
    """A handler on a subject."""

    def __init__(self, broker: MemoryBroker, subject: str, handler: Handler, counters: BusCounters) -> None:
        self.subject = subject
        self._broker = broker
        self._handler = handler
        self._counters = counters
        self._open = True

    def receive(self, data: bytes) -> None:
        if not self._open:
            return
        try:
            message = decode(data)
        except MessageError as error:
            self._counters.malformed += 1
            logger.warning("malformed message on %s: %s", self.subject, error)
            return
        try:
            self._handler(message)
        except Exception:
            self._counters.handler_errors += 1
            logger.exception("a handler failed on a message of %s", self.subject)

    async def unsubscribe(self) -> None:
        self._open = False
        self._broker.detach(self)


class MemoryFollower(Follower):
    """A view of the requests, from the oldest on."""

    def __init__(self, broker: MemoryBroker, handler: Callable[[StoredRequest], None], counters: BusCounters) -> None:
        self._broker = broker
        self._handler = handler
        self._counters = counters
        self._open = True
        self._caught_up = asyncio.Event()
        for stored in broker.requests.values():
            self.feed(stored)
        asyncio.get_running_loop().call_soon(self._caught_up.set)

    def feed(self, stored: StoredRequest) -> None:
        asyncio.get_running_loop().call_soon(self._deliver, stored)

    async def caught_up(self) -> None:
        await self._caught_up.wait()

    async def unsubscribe(self) -> None:
        self._open = False
        self._broker.detach(self)

    def _deliver(self, stored: StoredRequest) -> None:
        if not self._open or stored.seq not in self._broker.requests:
            return
        try:
            self._handler(stored)
        except Exception:
            self._counters.handler_errors += 1
            logger.exception("a handler failed on request %d", stored.seq)


class MemoryBus(Bus):
    """One member's connection to a ``MemoryBroker``."""

    def __init__(self, broker: MemoryBroker, member: str) -> None:
        self.broker = broker
        self.subjects = broker.subjects
        self.member = member
        self.counters = BusCounters()
        self._closed = False
        self._open: list[Subscription] = []
        self._hooks: list[Callable[[], Awaitable[None]]] = []

    @property
    def closed(self) -> bool:
        return self._closed

    def publish(self, subject: str, message: Message, *, no_responders: Callable[[], None] | None = None) -> None:
        self._check()
        if not self.broker.inject(subject, encode(message)) and no_responders is not None:
            asyncio.get_running_loop().call_soon(no_responders)

    async def subscribe(self, subject: str, handler: Handler) -> Subscription:
        self._check()
        subscription = MemorySubscription(self.broker, subject, handler, self.counters)
        self.broker.attach(subscription)
        self._open.append(subscription)
        return subscription

    async def accept(self, request: Request, tenant: str, klass: str) -> int:
        return await self._turn(lambda: self.broker.store(request, tenant, klass))

    async def fetch(self, seq: int) -> StoredRequest | None:
        return await self._turn(lambda: self.broker.requests.get(seq))

    async def discard(self, seq: int) -> bool:
        return await self._turn(lambda: self.broker.requests.pop(seq, None) is not None)

    async def finish(self, seq: int, tenant: str, result: Result) -> bool:
        recorded = await self._turn(lambda: self.broker.record(tenant, result))
        await self.discard(seq)
        return recorded

    async def follow(self, handler: Callable[[StoredRequest], None]) -> Follower:
        self._check()
        follower = MemoryFollower(self.broker, handler, self.counters)
        self.broker.attach_follower(follower)
        self._open.append(follower)
        return follower

    async def contents(self) -> StreamContents:
        return await self._turn(self.broker.contents)

    async def lead(self, router: str, over: int | None = None) -> int:
        return await self._turn(lambda: self.broker.lead(router, over))

    async def leader(self) -> tuple[str, int]:
        return await self._turn(self.broker.leader)

    def on_reconnect(self, callback: Callable[[], Awaitable[None]]) -> Callable[[], None]:
        self._hooks.append(callback)
        return lambda: self._hooks.remove(callback)

    async def reconnect(self) -> None:
        """Behave as after a lost and regained connection."""
        self.counters.reconnects += 1
        for hook in self._hooks:
            await hook()

    async def round_trip_s(self) -> float:
        began = time.perf_counter()
        await self.flush()
        return time.perf_counter() - began

    async def flush(self) -> None:
        await self._turn(lambda: None)

    async def close(self) -> None:
        if not self._closed:
            await self.flush()
            self._closed = True
            for subscription in self._open:
                await subscription.unsubscribe()

    async def _turn(self, work: Callable[[], T]) -> T:
        """Let what was published before be delivered, then do the work, as a server would."""
        self._check()
        await asyncio.sleep(0)
        return work()

    def _check(self) -> None:
        if self._closed:
            raise BusUnavailable("the connection is closed")
