"""A bus in memory whose worker the test plays: it sees what the gateway stores and publishes, and sends tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from llmserve.bus.base import Bus, BusError, Follower, Handler, StoredRequest, StreamContents, Subscription
from llmserve.bus.messages import (
    AnyMessage,
    AttemptLost,
    Cancel,
    Delta,
    Deltas,
    Message,
    Reason,
    Request,
    Result,
    decode,
    encode,
)
from llmserve.bus.subjects import Subjects


class _Nothing(Subscription):
    async def unsubscribe(self) -> None: ...


class FakeBus(Bus):
    """Keeps accepted requests until they are discarded; ``refuse`` makes the next acceptances fail."""

    def __init__(self, deployment: str = "test") -> None:
        self.subjects = Subjects(deployment)
        self.handlers: dict[str, list[Handler]] = {}
        self.stored: dict[int, StoredRequest] = {}
        self.accepted: list[StoredRequest] = []
        self.published: list[tuple[str, AnyMessage]] = []
        self.refuse: list[BusError] = []
        self.on_accept: Callable[[StoredRequest], None] = lambda _: None
        self.delay_s = 0.0

    def publish(self, subject: str, message: Message, *, no_responders: Callable[[], None] | None = None) -> None:
        sent = decode(encode(message))
        self.published.append((subject, sent))
        for handler in self.handlers.get(subject, []):
            handler(sent)

    async def subscribe(self, subject: str, handler: Handler) -> Subscription:
        self.handlers.setdefault(subject, []).append(handler)
        return _Nothing()

    async def accept(self, request: Request, tenant: str, klass: str) -> int:
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        if self.refuse:
            raise self.refuse.pop(0)
        for seq, known in self.stored.items():
            if (known.request.request_id, known.request.attempt) == (request.request_id, request.attempt):
                return seq
        klass, tenant = self.subjects.parse_request(self.subjects.request(klass, tenant))
        seq = len(self.accepted) + 1
        stored = StoredRequest(seq, tenant, klass, request, encode(request))
        self.stored[seq] = stored
        self.accepted.append(stored)
        self.on_accept(stored)
        return seq

    async def fetch(self, seq: int) -> StoredRequest | None:
        return self.stored.get(seq)

    async def discard(self, seq: int) -> bool:
        return self.stored.pop(seq, None) is not None

    async def finish(self, seq: int, tenant: str, result: Result) -> bool:
        return self.stored.pop(seq, None) is not None

    async def follow(self, handler: Callable[[StoredRequest], None]) -> Follower:
        raise NotImplementedError

    @property
    def closed(self) -> bool:
        return False

    async def contents(self) -> StreamContents:
        raise NotImplementedError

    async def lead(self, router: str, over: int | None = None) -> int:
        raise NotImplementedError

    async def leader(self) -> tuple[str, int]:
        return "", 0

    def on_reconnect(self, callback: Callable[[], Awaitable[None]]) -> Callable[[], None]:
        return lambda: None

    async def round_trip_s(self) -> float:
        return 0.0

    async def flush(self) -> None: ...

    async def close(self) -> None: ...

    def cancelled(self) -> list[str]:
        """Ids of all requests that a ``Cancel`` named."""
        return [i for _, message in self.published if isinstance(message, Cancel) for i in message.request_ids]

    def send(
        self, request: Request, tokens: Sequence[int], offset: int = 0, reason: Reason | None = None, **extra: object
    ) -> None:
        """One delta of ``request``'s attempt."""
        delta = Delta(request.request_id, request.attempt, offset, list(tokens), reason, **extra)  # type: ignore[arg-type]
        self.publish(self.subjects.gateway(request.gateway), Deltas(worker="w", items=[delta]))

    def lose(self, stored: StoredRequest) -> None:
        """The router gives the attempt up."""
        request = stored.request
        lost = AttemptLost(request_id=request.request_id, attempt=request.attempt, seq=stored.seq, cause="killed")
        self.publish(self.subjects.gateway(request.gateway), lost)


class Script:
    """A worker that yields ``tokens`` and ends, one token a step, as soon as it sees a request."""

    def __init__(self, bus: FakeBus, tokens: Sequence[int], *, stop_after: int | None = None) -> None:
        self.bus = bus
        self.tokens = list(tokens)
        self.stop_after = stop_after
        """Tokens after which the worker falls silent."""
        self.tasks: list[asyncio.Task[None]] = []

    def __call__(self, stored: StoredRequest) -> None:
        self.tasks.append(asyncio.get_running_loop().create_task(self._run(stored)))

    async def _run(self, stored: StoredRequest) -> None:
        request = stored.request
        end = min(len(self.tokens), request.offset + request.max_tokens)
        for offset in range(request.offset, end):
            if self.stop_after is not None and offset >= self.stop_after:
                return
            await asyncio.sleep(0)
            last = offset == end - 1
            whole = last and end == len(self.tokens)
            reason = (Reason.STOP if whole else Reason.LENGTH) if last else None
            cached = {"cached_tokens": 3} if offset == 0 else {}
            self.bus.send(request, [self.tokens[offset]], offset, reason, **cached)
        await self.bus.discard(stored.seq)
