"""nats-py's client with a straight way in and out.

The library hands a received message through a queue to a task of its subscription, and a published one through a
queue to a flusher's task: five turns of the event loop for a message that is passed on. Here a handler is called
from where the socket is read, and a publish is with the transport when it returns (uvloop writes all of a turn in
one call): a message that is passed on takes no turn.
Connecting, TLS, authorization, pings and reconnecting are the library's as before.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from nats.aio.client import Client
from nats.errors import BadHeaderError, BadSubjectError, ConnectionClosedError, MaxPayloadError, ProtocolError
from nats.protocol.parser import Parser

if TYPE_CHECKING:
    from nats.aio.subscription import Subscription

_CONTROL_LINE_MAX_BYTES = 64 << 10
_BACKLOG_MAX_BYTES = 1 << 20
_UNFIT = re.compile(r"\s")
"""In a subject it would end the line and begin a command of the sender's choice."""


class Arrived:
    """A message as it came; what few handlers look at is decoded when it is asked for."""

    __slots__ = ("_head", "_reply", "_subject", "data")

    def __init__(self, subject: bytes, reply: bytes, data: bytes, head: bytes) -> None:
        self._subject = subject
        self._reply = reply
        self.data = data
        self._head = head

    @property
    def subject(self) -> str:
        return self._subject.decode()

    @property
    def reply(self) -> str:
        return self._reply.decode()

    @property
    def headers(self) -> dict[str, str] | None:
        """With the status line's code under ``Status`` and its text under ``Description``."""
        return parse_head(self._head) if self._head else None

    @property
    def status(self) -> str:
        """The status line's code; empty if it has none. Most messages have headers for others to read."""
        return self._head[9:12].decode() if self._head[8:9] == b" " else ""


Deliver = Callable[[Arrived], None]


def parse_head(head: bytes) -> dict[str, str]:
    """The headers of ``NATS/1.0 [status [description]]`` and the ``name: value`` lines after it."""
    first, *lines = head.decode("utf-8", "surrogateescape").split("\r\n")
    headers = {}
    _, code, description = (first + "  ").split(" ", 2)
    if code.isdigit():
        headers["Status"] = code
    if text := description.strip():
        headers["Description"] = text
    for line in lines:
        name, separator, value = line.partition(":")
        if separator:
            headers[name.strip()] = value.strip()
    return headers


class DirectParser(Parser):  # type: ignore[misc]
    """Cuts the server's bytes into messages, and calls their handlers."""

    def __init__(self, client: DirectClient) -> None:
        self._handlers = client.handlers
        self._parts: list[bytes] = []
        self._resets = 0
        self._delivering = False
        self._deferred: list[Callable[[], None]] = []
        self.busy = False
        """Whether ``parse`` waits in the middle of what it was given."""
        super().__init__(client)

    def reset(self) -> None:
        """Another connection begins."""
        super().reset()
        self._parts.clear()
        self._missing = 0
        """Bytes at least without which there is nothing more to read in ``_parts``."""
        self._resets += 1

    async def parse(self, data: bytes = b"") -> None:
        """Take in what was received, the server's commands too. Raises ``ProtocolError``."""
        self.busy = True
        try:
            rest = self.deliver(data)
            while rest:
                resets, stop = self._resets, rest.find(b"\r\n")
                await self._control(rest[:stop])
                if self._resets != resets:  # what is left is of a connection that is no more
                    return
                rest = self.deliver(rest[stop + 2 :])
        finally:
            self.busy = False

    def deliver(self, data: bytes) -> bytes:
        """Take in messages; returns what follows from the first command on. Raises ``ProtocolError``."""
        if self._parts:
            self._parts.append(data)
            self._missing -= len(data)
            if self._missing > 0:
                return b""
            data = b"".join(self._parts)
            self._parts.clear()
        self._delivering = True
        try:
            return self._deliver(data)
        finally:
            self._delivering = False
            deferred, self._deferred = self._deferred, []
            for work in deferred:
                work()

    def defer(self, work: Callable[[], None]) -> None:
        """Have ``work`` done after all messages that were received together, or next if none is being delivered."""
        if self._delivering:
            self._deferred.append(work)
        else:
            asyncio.get_running_loop().call_soon(work)

    def _deliver(self, data: bytes) -> bytes:
        at, end = 0, len(data)
        while at < end:
            stop = data.find(b"\r\n", at)
            if stop < 0:
                self._keep(data[at:], 1)
                return b""
            kind = data[at]
            if kind != 0x4D and kind != 0x48:  # neither MSG nor HMSG
                return data[at:]
            after = self._message(data, at, stop)
            if after > end:
                self._keep(data[at:], after - end)
                return b""
            at = after
        return b""

    def _keep(self, rest: bytes, missing: int) -> None:
        if missing == 1 and len(rest) > _CONTROL_LINE_MAX_BYTES and b"\r\n" not in rest:
            raise ProtocolError("nats: a control line without an end")
        self._parts.append(rest)
        self._missing = missing

    def _message(self, data: bytes, at: int, stop: int) -> int:
        """Deliver the message whose line ends at ``stop``, if all of it is there; returns where it ends."""
        fields = data[at:stop].split()
        try:
            if data[at] == 0x4D:
                head_size = 0
                _, subject, sid, *reply, size_field = fields
            else:
                _, subject, sid, *reply, head_field, size_field = fields
                head_size = int(head_field)
            size = int(size_field)
        except ValueError as error:
            raise ProtocolError("nats: malformed MSG") from error
        body = stop + 2
        after = body + size + 2
        if after <= len(data):
            deliver = self._handlers.get(sid)
            if deliver is not None:  # else it is a message of a subscription that has ended
                split = body + head_size
                deliver(Arrived(subject, reply[0] if reply else b"", data[split : after - 2], data[body:split]))
        return after

    async def _control(self, line: bytes) -> None:
        word = line[:4].upper()
        if word == b"PING":
            await self.nc._process_ping()
        elif word == b"PONG":
            await self.nc._process_pong()
        elif word == b"INFO":
            await self.nc._process_info(json.loads(line[5:]))
        elif word == b"-ERR":
            await self.nc._process_err(line[5:].decode().lower())
        elif not word.startswith(b"+OK"):
            raise ProtocolError("nats: unknown protocol")


class DirectClient(Client):  # type: ignore[misc]
    """A client whose subscriptions are made with ``listen``, and that sends with ``send``."""

    _pending: list[bytes]
    """The library's commands that its flusher has not written yet."""

    def __init__(self) -> None:
        self.handlers: dict[bytes, Deliver] = {}
        """By subscription id, as it stands in messages."""
        super().__init__()
        self._ps = DirectParser(self)

    async def listen(self, subject: str, deliver: Deliver) -> Subscription:
        """Have ``deliver`` called from the read loop for every message; it must not raise."""
        # The library's subscription is there to be sent again after a reconnect; nothing is ever queued in it.
        subscription = await self.subscribe(subject, cb=_never)
        self.handlers[b"%d" % subscription._id] = deliver
        return subscription

    async def unlisten(self, subscription: Subscription) -> None:
        """End it. Raises ``nats.errors.Error`` if the connection is gone, and the subscription with it."""
        self.handlers.pop(b"%d" % subscription._id, None)
        await subscription.unsubscribe()

    def defer(self, work: Callable[[], None]) -> None:
        """See ``DirectParser.defer``."""
        self._ps.defer(work)

    async def _read_loop(self) -> None:
        """The library's, which is left with the server's commands."""
        parser, reader = self._ps, self._transport._io_reader
        parser.reset()  # the library does not where a connection fails while it is being made
        buffer = reader.feed_data

        def feed(data: bytes) -> None:
            if reader._buffer or parser.busy:  # behind a command that has not been obeyed yet
                buffer(data)
                return
            # The library uses one transport for all its connections, each with a reader of its own.
            if self._transport._io_reader is not reader or self.is_closed or self.is_reconnecting:
                return
            try:
                rest = parser.deliver(data)
            except ProtocolError:
                rest = b"\r\n"  # which is no command either, and the library's loop acts on that
            if rest:
                buffer(rest)

        reader.feed_data = feed
        await super()._read_loop()

    def send(self, subject: str, data: bytes, reply: str = "", headers: dict[str, str] | None = None) -> None:
        """Write a publish behind all that was said before. Raises ``nats.errors.Error`` or ``OSError``."""
        if not subject or _UNFIT.search(subject) or (reply and _UNFIT.search(reply)):
            raise BadSubjectError
        size = len(data)
        if headers is not None:
            lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            if lines.count("\n") != len(headers):
                raise BadHeaderError(lines)
            head = f"NATS/1.0\r\n{lines}\r\n".encode()
            size += len(head)
            command = f"HPUB {subject} {reply} {len(head)} {size}\r\n".encode() + head
        else:
            command = f"PUB {subject} {reply} {size}\r\n".encode()
        if size > self._max_payload:
            raise MaxPayloadError
        if not self.is_connected:
            raise ConnectionClosedError
        pending = self._pending
        pending.append(b"%b%b\r\n" % (command, data))
        self._pending, self._pending_data_size = [], 0
        try:
            self._transport.writelines(pending)
        except RuntimeError as error:  # uvloop's, of a socket that was closed a moment ago
            raise ConnectionClosedError from error

    @property
    def congested(self) -> bool:
        """Whether the server takes less than was sent: the rest should wait for ``drain``."""
        writer = self._transport._io_writer
        return writer is None or writer.transport.get_write_buffer_size() > _BACKLOG_MAX_BYTES

    async def drain_writes(self) -> None:
        """Return once the server has taken most of what was sent. Raises ``OSError``."""
        await self._transport.drain()


async def _never(_: object) -> None:
    """The library wants a callback."""
