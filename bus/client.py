"""Making and ending nats-py clients, with the settings that its traps call for; ``Publisher`` is for users."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import nats.errors

from llmserve.bus.base import BusError
from llmserve.bus.inbox import Reply
from llmserve.bus.publisher import Publisher
from llmserve.bus.settings import BusCounters
from llmserve.bus.tls import PlainServer, TlsClient, client_tls
from llmserve.bus.wire import DirectClient
from llmserve.manifests.schema import BusTls

if TYPE_CHECKING:
    from nats.aio.subscription import Subscription as ClientSubscription

__all__ = [
    "Callbacks",
    "Publisher",
    "RawSubscription",
    "Server",
    "close_client",
    "open_client",
    "shown_url",
]

logger = logging.getLogger(__name__)

_USERINFO = re.compile(r"//[^/@,]*@")


@dataclass(frozen=True, slots=True)
class Server:
    """Where to connect, and as whom."""

    url: str
    """Or several, with commas between them: the servers of one cluster."""
    token: str | None
    name: str
    tls: BusTls | None = None

    @property
    def urls(self) -> list[str]:
        return [url.strip() for url in self.url.split(",") if url.strip()]

    @property
    def any_token(self) -> str | None:
        """The token that was given, else that of a URL: the cluster's other servers announce themselves without."""
        if self.token:
            return self.token
        parts = [urlsplit(url) for url in self.urls]
        return next((part.username for part in parts if part.username and part.password is None), None)


@dataclass(frozen=True, slots=True)
class Callbacks:
    """What a client reports about its connection; each gets the client."""

    down: Callable[[DirectClient], None]
    up: Callable[[DirectClient], None]
    closed: Callable[[DirectClient], None]
    error: Callable[[Exception], Awaitable[None]]


class RawSubscription:
    """A subscription that outlives the client object it runs on."""

    def __init__(self, subject: str, callback: Callable[[Reply], None], counters: BusCounters) -> None:
        self._counters = counters
        self.subject = subject
        self.callback = callback
        self.on_client: ClientSubscription | None = None

    def receive(self, message: Reply) -> None:
        """What the client calls; an error of the callback is logged and counted, never the client's."""
        try:
            self.callback(message)
        except Exception:
            self._counters.handler_errors += 1
            logger.exception("a handler failed on a message of %s", self.subject)


async def open_client(
    server: Server, callbacks: Callbacks, reconnect_wait_s: float, timeout_s: float
) -> DirectClient:
    """A connected client that reconnects for ever.

    Raises ``BusError`` if the token is refused, ``OSError``, ``nats.errors.Error`` or ``TimeoutError`` otherwise.
    """
    tls = client_tls(server.url, server.tls)
    client = DirectClient() if tls is None else TlsClient()
    security: dict[str, object] = {} if tls is None else {"tls": tls.context}
    user, separator, password = (server.any_token or "").partition(":")
    security |= {"user": user, "password": password} if separator else {"token": server.any_token}

    async def down() -> None:
        if tls is not None:
            tls.refresh()
        callbacks.down(client)

    async def up() -> None:
        callbacks.up(client)

    async def closed() -> None:
        callbacks.closed(client)

    try:
        # Without the timeout a refused connection would be tried for ever.
        async with asyncio.timeout(timeout_s):
            await client.connect(
                server.urls,
                **security,
                name=server.name,
                connect_timeout=2,
                allow_reconnect=False,
                max_reconnect_attempts=-1,
                reconnect_time_wait=reconnect_wait_s,
                ping_interval=5,
                max_outstanding_pings=2,
                flusher_queue_size=4096,
                pending_size=8 << 20,
                # Without it a publish beyond ``pending_size`` could wait for ever for a flusher that a
                # disconnect has ended.
                flush_timeout=2,
                error_cb=callbacks.error,
                disconnected_cb=down,
                reconnected_cb=up,
                closed_cb=closed,
            )
    except BaseException as error:
        await close_client(client)
        if isinstance(error, nats.errors.Error) and "authorization" in str(error).lower():
            raise BusError(f"the bus at {shown_url(server.url)} refuses the token") from error
        if isinstance(error, PlainServer):
            raise BusError(f"{shown_url(server.url)}: {error}") from error
        raise
    # Off until here, so that a refused token is an error and not tried again in silence.
    client.options["allow_reconnect"] = True
    return client


def shown_url(url: str) -> str:
    """Without what may be a secret in it."""
    return _USERINFO.sub("//", url)


async def close_client(client: DirectClient) -> None:
    """Close it; never raises (under uvloop closing while it reconnects raises RuntimeError, among others)."""
    try:
        await asyncio.wait_for(client.close(), 2)
    except Exception as error:
        logger.debug("closing the client: %r", error)


def error_text(error: BaseException) -> str:
    """For people: some errors of nats-py say nothing but their names."""
    return str(error) or type(error).__name__
