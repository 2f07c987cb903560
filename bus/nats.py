"""The bus on a nats-server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from llmserve.bus.base import (
    Bus,
    BusError,
    BusUnavailable,
    Follower,
    Handler,
    Overtaken,
    QueueFull,
    StoredRequest,
    StreamContents,
    Subscription,
)
from llmserve.bus.client import RawSubscription
from llmserve.bus.connection import Connection
from llmserve.bus.follower import StreamFollower
from llmserve.bus.inbox import Reply
from llmserve.bus.jetstream import QUEUE_FULL, WRONG_LAST_SEQUENCE, ApiError, JetStream, StoredMessage
from llmserve.bus.messages import Message, MessageError, Request, Result, decode, encode
from llmserve.bus.outbox import Outgoing
from llmserve.bus.settings import BusCounters, BusSettings
from llmserve.bus.streams import ensure_streams, leader_subject
from llmserve.bus.subjects import Subjects

logger = logging.getLogger(__name__)


async def connect(
    url: str, token: str | None, deployment: str, *, member: str, settings: BusSettings | None = None
) -> NatsBus:
    """Connect and make the deployment's streams; ``member`` names the connection.

    Raises ``BusUnavailable`` after ``publish_patience_s``, ``BusError`` if the server refuses.
    """
    settings = settings or BusSettings()
    connection = Connection(url, token, member, settings)
    await connection.open(settings.publish_patience_s)
    bus = NatsBus(connection, Subjects(deployment), member)
    try:
        await bus.ensure_streams()
    except BaseException:
        await bus.close()
        raise
    return bus


class NatsBus(Bus):
    """Made by ``connect``."""

    def __init__(self, connection: Connection, subjects: Subjects, member: str) -> None:
        self.subjects = subjects
        self.member = member
        self._connection = connection
        self._api = JetStream(connection)
        self._followers: set[StreamFollower] = set()
        connection.on_reconnect(self.ensure_streams)
        connection.on_reconnect(self._doubt_followers)

    @property
    def jetstream(self) -> JetStream:
        """What files, batches and direct publishing are kept on."""
        return self._api

    @property
    def connection(self) -> Connection:
        return self._connection

    @property
    def counters(self) -> BusCounters:
        """What went wrong on this connection so far."""
        return self._connection.counters

    @property
    def connected(self) -> bool:
        return self._connection.connected

    @property
    def closed(self) -> bool:
        return self._connection.closed

    @property
    def reconnected_s(self) -> float:
        return self._connection.reconnected_s

    async def ensure_streams(self) -> None:
        """Make the streams, or change them to the settings. Also after a reconnect: the server may be a new one."""
        await ensure_streams(self._api, self.subjects, self._connection.settings)

    # -- core NATS -----------------------------------------------------------------------------------------------

    def publish(self, subject: str, message: Message, *, no_responders: Callable[[], None] | None = None) -> None:
        if self._connection.closed:
            raise BusUnavailable("the connection is closed")
        self._connection.publish(Outgoing(subject, encode(message), no_responders))

    async def subscribe(self, subject: str, handler: Handler) -> Subscription:
        def receive(message: Reply) -> None:
            try:
                decoded = decode(message.data)
            except MessageError as error:
                self._malformed(message.subject, error)
                return
            handler(decoded)

        return _NatsSubscription(self._connection, await self._connection.subscribe(subject, receive))

    # -- streams -------------------------------------------------------------------------------------------------

    async def accept(self, request: Request, tenant: str, klass: str) -> int:
        headers = {"Nats-Msg-Id": f"{request.request_id}.{request.attempt}"}
        try:
            return await self._api.publish(self.subjects.request(klass, tenant), encode(request), headers)
        except ApiError as error:
            if error.failure.err_code == QUEUE_FULL:
                raise QueueFull(f"the queue of tenant {tenant} is full: {error.failure.description}") from error
            raise

    async def fetch(self, seq: int) -> StoredRequest | None:
        message = await self._api.get(self.subjects.request_stream, seq)
        return None if message is None else self._stored(message)

    async def discard(self, seq: int) -> bool:
        return await self._api.delete(self.subjects.request_stream, seq)

    async def finish(self, seq: int, tenant: str, result: Result) -> bool:
        subject = self.subjects.result(tenant, result.request_id)
        recorded = await self._insist(lambda: self._record(subject, encode(result)))
        await self._insist(lambda: self.discard(seq))
        return recorded

    async def _record(self, subject: str, data: bytes) -> bool:
        """Write the result unless there is one; True if the one that stands is ours."""
        try:
            await self._api.publish(subject, data, {"Nats-Expected-Last-Subject-Sequence": "0"})
            return True
        except ApiError as error:
            if error.failure.err_code != WRONG_LAST_SEQUENCE:
                raise
        # A try whose answer was lost may have been the one that wrote it.
        standing = await self._api.get_last(self.subjects.result_stream, subject)
        return standing is not None and standing.data == data

    async def _insist(self, work: Callable[[], Awaitable[bool]]) -> bool:
        """Until it is done or the connection is closed."""
        while True:
            try:
                return await work()
            except BusError as error:
                if self._connection.closed:
                    raise BusUnavailable("the connection is closed") from error
                logger.warning("a request cannot be finished, trying again: %s", error)
                await asyncio.sleep(1.0)

    async def follow(self, handler: Callable[[StoredRequest], None]) -> Follower:
        def receive(message: StoredMessage) -> None:
            stored = self._stored(message)
            if stored is not None:
                handler(stored)

        follower = _NatsFollower(self._connection, self._api, self.subjects.request_stream, receive)
        follower.left = lambda: self._followers.discard(follower)
        await follower.start()
        self._followers.add(follower)
        return follower

    async def contents(self) -> StreamContents:
        return StreamContents(*await self._api.contents(self.subjects.request_stream))

    async def lead(self, router: str, over: int | None = None) -> int:
        subject = leader_subject(self.subjects)
        headers = {} if over is None else {"Nats-Expected-Last-Subject-Sequence": str(over)}
        try:
            return await self._api.publish(subject, router.encode(), headers)
        except ApiError as error:
            if error.failure.err_code != WRONG_LAST_SEQUENCE:
                raise
        # A try whose answer was lost may have been the one that took it.
        leader, epoch = await self.leader()
        if leader == router and over is not None and epoch > over:
            return epoch
        raise Overtaken(f"router {leader!r} leads in epoch {epoch}")

    async def leader(self) -> tuple[str, int]:
        message = await self._api.get_last(f"KV_{self.subjects.bucket}", leader_subject(self.subjects))
        return ("", 0) if message is None else (message.data.decode(), message.seq)

    # -- the connection ------------------------------------------------------------------------------------------

    def on_reconnect(self, callback: Callable[[], Awaitable[None]]) -> Callable[[], None]:
        return self._connection.on_reconnect(callback)

    def defer(self, work: Callable[[], None]) -> None:
        self._connection.defer(work)

    async def round_trip_s(self) -> float:
        return await self._connection.round_trip_s()

    async def flush(self) -> None:
        await self._connection.flush()

    async def close(self) -> None:
        for follower in list(self._followers):
            await follower.unsubscribe()
        await self._connection.close()

    async def _doubt_followers(self) -> None:
        for follower in self._followers:
            follower.doubt()

    def _stored(self, message: StoredMessage) -> StoredRequest | None:
        try:
            klass, tenant = self.subjects.parse_request(message.subject)
            request = decode(message.data)
        except ValueError as error:
            self._malformed(message.subject, error)
            return None
        if not isinstance(request, Request):
            self._malformed(message.subject, TypeError(f"a {type(request).__name__} on the request stream"))
            return None
        return StoredRequest(message.seq, tenant, klass, request, message.data)

    def _malformed(self, subject: str, error: Exception) -> None:
        self.counters.malformed += 1
        logger.warning("malformed message on %s (%d so far): %s", subject, self.counters.malformed, error)


class _NatsSubscription(Subscription):
    def __init__(self, connection: Connection, raw: RawSubscription) -> None:
        self._connection = connection
        self._raw = raw

    async def unsubscribe(self) -> None:
        await self._connection.drop(self._raw)


class _NatsFollower(StreamFollower):
    left: Callable[[], None]

    async def unsubscribe(self) -> None:
        self.left()
        await super().unsubscribe()
