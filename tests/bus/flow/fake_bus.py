"""Buses of one process over one shared hub: just enough of ``Bus`` to drive a router."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from llmserve.bus.base import Bus, Follower, Handler, Overtaken, StoredRequest, StreamContents, Subscription
from llmserve.bus.messages import Message, Request, Result, decode, encode
from llmserve.bus.subjects import Subjects


@dataclass
class Hub:
    handlers: dict[str, list[Handler]] = field(default_factory=dict)
    followers: list[Callable[[StoredRequest], None]] = field(default_factory=list)
    stream: dict[int, StoredRequest] = field(default_factory=dict)
    seq: int = 0
    leader: tuple[str, int] = ("", 0)
    discarded: list[int] = field(default_factory=list)


class FakeSubscription(Follower):
    def __init__(self, remove: Callable[[], None]) -> None:
        self._remove = remove

    async def unsubscribe(self) -> None:
        self._remove()

    async def caught_up(self) -> None:
        return


class FakeBus(Bus):
    def __init__(self, hub: Hub) -> None:
        self.subjects = Subjects("test")
        self.hub = hub

    def publish(self, subject: str, message: Message, *, no_responders: Callable[[], None] | None = None) -> None:
        handlers = list(self.hub.handlers.get(subject, []))
        for handler in handlers:
            handler(decode(encode(message)))
        if not handlers and no_responders is not None:
            no_responders()

    async def subscribe(self, subject: str, handler: Handler) -> Subscription:
        self.hub.handlers.setdefault(subject, []).append(handler)
        return FakeSubscription(lambda: self.hub.handlers[subject].remove(handler))

    async def accept(self, request: Request, tenant: str, klass: str) -> int:
        self.hub.seq += 1
        item = StoredRequest(self.hub.seq, tenant, klass, request, encode(request))
        self.hub.stream[item.seq] = item
        for follower in list(self.hub.followers):
            follower(item)
        return item.seq

    async def fetch(self, seq: int) -> StoredRequest | None:
        return self.hub.stream.get(seq)

    async def discard(self, seq: int) -> bool:
        self.hub.discarded.append(seq)
        return self.hub.stream.pop(seq, None) is not None

    async def finish(self, seq: int, tenant: str, result: Result) -> bool:
        return self.hub.stream.pop(seq, None) is not None

    async def follow(self, handler: Callable[[StoredRequest], None]) -> Follower:
        for item in self.hub.stream.values():
            handler(item)
        self.hub.followers.append(handler)
        return FakeSubscription(lambda: self.hub.followers.remove(handler))

    @property
    def closed(self) -> bool:
        return False

    async def contents(self) -> StreamContents:
        return StreamContents(self.hub.seq, frozenset(self.hub.stream))

    async def lead(self, router: str, over: int | None = None) -> int:
        if over is not None and over != self.hub.leader[1]:
            raise Overtaken(f"router {self.hub.leader[0]!r} leads")
        self.hub.leader = (router, self.hub.leader[1] + 1)
        return self.hub.leader[1]

    async def leader(self) -> tuple[str, int]:
        return self.hub.leader

    def on_reconnect(self, callback: Callable[[], Awaitable[None]]) -> Callable[[], None]:
        return lambda: None

    async def round_trip_s(self) -> float:
        return 0.0

    async def flush(self) -> None:
        return

    async def close(self) -> None:
        return
