"""A work queue on JetStream: one of several takers gets a message and works on it for as long as it takes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from llmserve.bus.base import BusError
from llmserve.bus.client import RawSubscription
from llmserve.bus.connection import Connection
from llmserve.bus.inbox import Disconnected, Reply
from llmserve.bus.jetstream import Config, JetStream

log = logging.getLogger(__name__)

ACK_WAIT_S = 10.0
"""A taker that has not said for so long that it works on a message has lost it to another."""
_PULL_S = 5.0


@dataclass(slots=True, eq=False)
class Job:
    """One message, taken."""

    data: bytes
    headers: Mapping[str, str]
    seq: int
    _ack_subject: str
    _connection: Connection

    async def working(self) -> None:
        """To be called more often than each ``ACK_WAIT_S``."""
        await self._say(b"+WPI")

    async def done(self) -> None:
        """Take it off the queue; told again until the server has heard it or the connection is closed."""
        while not self._connection.closed:
            try:
                await self._connection.request(self._ack_subject, b"+ACK", 1.0)
                return
            except (TimeoutError, Disconnected):
                await asyncio.sleep(0.2)

    async def give_back(self, after_s: float = 0.0) -> None:
        """Let another one take it, or this one later."""
        await self._say(b'-NAK {"delay": %d}' % round(after_s * 1e9) if after_s else b"-NAK")

    async def _say(self, what: bytes) -> None:
        try:
            await self._connection.request(self._ack_subject, what, 1.0)
        except (TimeoutError, Disconnected, BusError) as error:
            # Then it is delivered again, which is harmless.
            log.debug("%s was not heard: %r", what, error)


class WorkTaker:
    """Takes at most ``at_once`` messages of a stream's consumer; ``handle`` gets each, and ``free`` must follow."""

    def __init__(
        self, connection: Connection, api: JetStream, stream: str, at_once: int, handle: Callable[[Job], None]
    ) -> None:
        self._connection = connection
        self._api = api
        self._stream = stream
        self._at_once = at_once
        self._handle = handle
        self._taken = 0
        self._asked = 0
        self._asked_s = 0.0
        self._inbox = connection.inbox.fresh()
        self._wake = asyncio.Event()
        self._subscription: RawSubscription | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        config: Config = {
            "durable_name": "takers",
            "ack_policy": "explicit",
            "ack_wait": round(ACK_WAIT_S * 1e9),
            "max_deliver": -1,
            "max_ack_pending": 10000,
        }
        await self._api.call(
            f"CONSUMER.CREATE.{self._stream}.takers", {"stream_name": self._stream, "config": config}
        )
        self._subscription = await self._connection.subscribe(self._inbox, self._receive)
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._subscription is not None:
            await self._connection.drop(self._subscription)

    def free(self) -> None:
        """A job is over."""
        self._taken -= 1
        self._wake.set()

    def _receive(self, message: Reply) -> None:
        code = message.status
        if code == "100":
            return
        if code:
            # The request for messages has ended: expired, or the server is another one now.
            self._asked = 0
            self._wake.set()
            return
        self._asked = max(0, self._asked - 1)
        self._taken += 1
        # $JS.ACK.<stream>.<consumer>.<deliveries>.<stream sequence>... with or without domain and account.
        tokens = message.reply.split(".")
        seq = int(tokens[5] if len(tokens) < 12 else tokens[7])
        self._handle(Job(message.data, message.headers or {}, seq, message.reply, self._connection))

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            stale = time.monotonic() - self._asked_s > _PULL_S + 1
            wanted = self._at_once - self._taken
            if wanted > 0 and (not self._asked or stale):
                self._asked, self._asked_s = wanted, time.monotonic()
                body = b'{"batch": %d, "expires": %d}' % (wanted, round(_PULL_S * 1e9))
                subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.takers"
                self._connection.send(subject, body, self._inbox)
            try:
                async with asyncio.timeout(_PULL_S + 1):
                    await self._wake.wait()
            except TimeoutError:
                continue
