"""Replies to one connection: one wildcard subscription, one token for each that is awaited."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

NO_RESPONDERS = "503"


class Reply(Protocol):
    """What the client library hands over for a message."""

    @property
    def subject(self) -> str: ...
    @property
    def reply(self) -> str: ...
    @property
    def data(self) -> bytes: ...
    @property
    def headers(self) -> dict[str, str] | None: ...
    @property
    def status(self) -> str:
        """The status code in the headers, such as ``503``; empty if there is none."""


class Disconnected(Exception):
    """The connection was lost while a reply was awaited."""


@dataclass(slots=True)
class _Probe:
    callback: Callable[[], None]
    sent_s: float


class Inbox:
    """Tokens below one inbox subject.

    A request's token lives until its reply or its timeout. A probe's token awaits only "no responders": nothing
    tells that somebody did receive the message, so it is forgotten after ``probe_age_s``.
    """

    def __init__(self, root: str, probe_age_s: float = 5.0) -> None:
        self._root = root
        self._prefix = f"{root}.reply"
        self._probe_age_s = probe_age_s
        self._count = 0
        self._waiting: dict[str, asyncio.Future[Reply]] = {}
        self._probes: dict[str, _Probe] = {}

    @property
    def wildcard(self) -> str:
        return f"{self._prefix}.*"

    def fresh(self) -> str:
        """A subject of the connection's own, outside the wildcard, for a subscription of its own."""
        return f"{self._root}.own.{self._next()}"

    def expect(self, timeout_s: float) -> tuple[str, asyncio.Future[Reply]]:
        """(reply subject, future of the reply); the future raises ``TimeoutError`` or ``Disconnected``."""
        loop = asyncio.get_running_loop()
        token = self._next()
        future: asyncio.Future[Reply] = loop.create_future()
        self._waiting[token] = future
        timer = loop.call_later(timeout_s, self._expire, future)

        def over(_: asyncio.Future[Reply]) -> None:
            timer.cancel()
            self._waiting.pop(token, None)

        future.add_done_callback(over)
        return f"{self._prefix}.{token}", future

    def probe(self, callback: Callable[[], None]) -> str:
        """Reply subject whose "no responders" runs ``callback``."""
        now = time.monotonic()
        # In order of sending: the oldest come first.
        while self._probes:
            token, oldest = next(iter(self._probes.items()))
            if now - oldest.sent_s < self._probe_age_s:
                break
            del self._probes[token]
        token = self._next()
        self._probes[token] = _Probe(callback, now)
        return f"{self._prefix}.{token}"

    def deliver(self, message: Reply) -> None:
        """Hand a message to whoever waits for it; late ones are dropped."""
        token = message.subject.rpartition(".")[2]
        future = self._waiting.get(token)
        if future is not None and not future.done():
            future.set_result(message)
            return
        probe = self._probes.pop(token, None)
        if probe is not None and message.status == NO_RESPONDERS:
            probe.callback()

    def disconnected(self) -> None:
        """Fail every request in flight at once: its reply went to a connection that is no more."""
        for future in list(self._waiting.values()):
            if not future.done():
                future.set_exception(Disconnected())
                future.exception()  # whoever gave up waiting need not hear of it

    def _expire(self, future: asyncio.Future[Reply]) -> None:
        if not future.done():
            future.set_exception(TimeoutError())
            future.exception()

    def _next(self) -> str:
        self._count += 1
        return str(self._count)
