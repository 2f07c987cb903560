"""An ordered view of the request stream by one ephemeral push consumer that is made anew whenever it is in doubt."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import msgspec

from llmserve.bus.base import BusError, Follower
from llmserve.bus.client import RawSubscription
from llmserve.bus.connection import Connection
from llmserve.bus.inbox import Reply
from llmserve.bus.jetstream import Answer, ApiError, JetStream, StoredMessage
from llmserve.bus.outbox import Outgoing

logger = logging.getLogger(__name__)

_HEARTBEAT_S = 1.0
_SILENCE_S = 3.0
_NS = 1_000_000_000


class Place(msgspec.Struct, frozen=True):
    """Where a delivered message stands."""

    seq: int
    """In the stream."""
    delivery: int
    """In the consumer: without gaps, from 1."""
    pending: int
    """Messages of the stream that are still to come."""


def parse_place(reply: str) -> Place:
    """From ``$JS.ACK.[domain.account.]stream.consumer.tries.seq.delivery.time.pending[.random]`` (ADR-15)."""
    tokens = reply.split(".")
    base = 2 if len(tokens) < 11 else 4
    return Place(int(tokens[base + 3]), int(tokens[base + 4]), int(tokens[base + 6]))


class StreamFollower(Follower):
    """Calls ``handler`` once for each message from the oldest on; gaps, silence and reconnects are made good."""

    def __init__(
        self, connection: Connection, api: JetStream, stream: str, handler: Callable[[StoredMessage], None]
    ) -> None:
        self._connection = connection
        self._api = api
        self._stream = stream
        self._handler = handler
        self._next_seq = 1
        self._delivery = 0
        self._heard_s = time.monotonic()
        self._generation = 0
        self._raw: RawSubscription | None = None
        self._consumer = ""
        self._caught_up = asyncio.Event()
        self._doubt = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.recreations = 0

    async def start(self) -> None:
        """Begin; raises ``BusError`` if the consumer cannot be made."""
        await self._create()
        self._task = asyncio.create_task(self._watch())

    async def caught_up(self) -> None:
        await self._caught_up.wait()

    async def unsubscribe(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        await self._drop()

    def doubt(self) -> None:
        """The consumer may be gone or have skipped something: make another that goes on where this one was."""
        self._generation += 1  # what is still on its way from the old one is not heard
        self._doubt.set()

    async def _watch(self) -> None:
        while True:
            try:
                async with asyncio.timeout(_HEARTBEAT_S / 2):
                    await self._doubt.wait()
            except TimeoutError:
                if time.monotonic() - self._heard_s < _SILENCE_S or not self._connection.connected:
                    await self._check_pending()
                    continue
                logger.warning("stream %s: no heartbeat for %.0f s", self._stream, _SILENCE_S)
            try:
                await self._drop()
                await self._create()
                self.recreations += 1
            except BusError as error:
                logger.warning("stream %s cannot be followed, trying again: %s", self._stream, error)
                self._doubt.set()
                await asyncio.sleep(0.5)

    async def _create(self) -> None:
        self._doubt.clear()
        self._generation += 1
        generation = self._generation
        self._delivery = 0
        info = await self._api.call(f"STREAM.INFO.{self._stream}")
        last_seq = info.state.last_seq if info.state is not None else 0
        if last_seq + 1 < self._next_seq:
            logger.error(
                "stream %s went back from %d to %d: it was lost or replaced",
                self._stream,
                self._next_seq - 1,
                last_seq,
            )
            self._next_seq = last_seq + 1
        deliver = self._connection.inbox.fresh()
        self._raw = await self._connection.subscribe(deliver, lambda message: self._receive(message, generation))
        made = await self._api.call(f"CONSUMER.CREATE.{self._stream}", self._request(deliver))
        self._consumer = made.name
        self._heard_s = time.monotonic()
        if self._nothing_pending(made, generation):
            self._caught_up.set()

    def _nothing_pending(self, made: Answer, generation: int) -> bool:
        return made.num_pending == 0 and generation == self._generation and self._delivery == 0

    async def _check_pending(self) -> None:
        """What was pending may have been deleted meanwhile: then no message says that it was the last."""
        if self._caught_up.is_set() or not self._connection.connected:
            return
        try:
            info = await self._api.call(f"CONSUMER.INFO.{self._stream}.{self._consumer}")
        except BusError as error:
            logger.warning("stream %s: the consumer does not answer: %s", self._stream, error)
            self.doubt()
            return
        delivered = info.delivered.consumer_seq if info.delivered is not None else 0
        if info.num_pending == 0 and delivered == self._delivery:
            self._caught_up.set()

    def _request(self, deliver: str) -> object:
        return {
            "stream_name": self._stream,
            "config": {
                "ack_policy": "none",
                "deliver_subject": deliver,
                "deliver_policy": "by_start_sequence",
                "opt_start_seq": self._next_seq,
                "flow_control": True,
                "idle_heartbeat": round(_HEARTBEAT_S * _NS),
                "max_deliver": 1,
                "mem_storage": True,
                "num_replicas": 1,
                "inactive_threshold": 10 * _NS,
            },
        }

    async def _drop(self) -> None:
        raw, self._raw = self._raw, None
        if raw is not None:
            await self._connection.drop(raw)
        consumer, self._consumer = self._consumer, ""
        if consumer and self._connection.connected and not self._connection.closed:
            try:
                await self._api.call(f"CONSUMER.DELETE.{self._stream}.{consumer}")
            except ApiError as error:
                logger.debug("the consumer was gone already: %s", error)
            except BusError as error:
                logger.info("the consumer is left to expire: %s", error)

    def _receive(self, message: Reply, generation: int) -> None:
        if generation != self._generation:
            return
        self._heard_s = time.monotonic()
        if message.status == "100":
            self._control(message)
            return
        place = parse_place(message.reply)
        if place.delivery != self._delivery + 1:
            logger.warning("stream %s: delivery %d after %d", self._stream, place.delivery, self._delivery)
            self.doubt()
            return
        self._delivery = place.delivery
        try:
            if place.seq >= self._next_seq:
                self._next_seq = place.seq + 1
                self._handler(StoredMessage(place.seq, message.subject, message.data))
        finally:
            if place.pending == 0:
                self._caught_up.set()

    def _control(self, message: Reply) -> None:
        """Flow control is answered here, after all that came before it was handled."""
        headers = message.headers or {}
        if message.reply:
            self._connection.publish(Outgoing(message.reply, b""))
            return
        stalled = headers.get("Nats-Consumer-Stalled")
        if stalled:
            self._connection.publish(Outgoing(stalled, b""))
        elif int(headers.get("Nats-Last-Consumer", self._delivery)) > self._delivery:
            logger.warning("stream %s: deliveries were lost", self._stream)
            self.doubt()
