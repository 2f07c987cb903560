"""One connection to a nats-server that reconnects for ever: subscriptions, publishes and requests."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable

import nats.errors

from llmserve.bus.base import BusError, BusUnavailable
from llmserve.bus.client import Callbacks, RawSubscription, Server, close_client, error_text, open_client, shown_url
from llmserve.bus.inbox import Disconnected, Inbox, Reply
from llmserve.bus.outbox import Outbox, Outgoing
from llmserve.bus.settings import BusCounters, BusSettings
from llmserve.bus.wire import DirectClient

logger = logging.getLogger(__name__)

_LOG_EVERY_S = 5.0
_STALLED_S = 10.0


class Connection:
    """Subscriptions, publishes and requests over one client. ``open`` first, ``close`` last."""

    def __init__(self, url: str, token: str | None, name: str, settings: BusSettings) -> None:
        self._server = Server(url, token, name, settings.tls)
        self.settings = settings
        self.counters = BusCounters()
        self.outbox = Outbox(settings.outbox_max_bytes, self.counters)
        self.closed = False
        self.reconnected_s = -math.inf
        self._client: DirectClient | None = None
        self._subscriptions: set[RawSubscription] = set()
        self._up = asyncio.Event()
        self._hooks: list[Callable[[], Awaitable[None]]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._last_sign_s = time.monotonic()
        self._last_log_s = 0.0
        self.inbox = Inbox(f"_INBOX.{random.getrandbits(128):032x}")

    async def open(self, patience_s: float) -> None:
        """Connect; raises ``BusUnavailable`` after ``patience_s``, ``BusError`` if the token is refused."""
        deadline = time.monotonic() + patience_s
        while True:
            try:
                await self._connect(max(0.1, deadline - time.monotonic()))
                break
            except (OSError, nats.errors.Error, TimeoutError) as error:
                if time.monotonic() > deadline:
                    raise BusUnavailable(f"no bus at {shown_url(self._server.url)}: {error_text(error)}") from error
                await asyncio.sleep(self._pause_s())
        await self.subscribe(self.inbox.wildcard, self.inbox.deliver)
        self._spawn(self._write())
        self._spawn(self._guard())

    @property
    def connected(self) -> bool:
        return self._up.is_set()

    @property
    def max_payload_bytes(self) -> int:
        return int(self._client.max_payload) if self._client is not None else 0

    def on_reconnect(self, hook: Callable[[], Awaitable[None]]) -> Callable[[], None]:
        """Run ``hook`` after every reconnect, after those registered before, until what is returned is called."""
        self._hooks.append(hook)
        return lambda: self._hooks.remove(hook)

    async def subscribe(self, subject: str, callback: Callable[[Reply], None]) -> RawSubscription:
        """Call ``callback`` for each message on ``subject``, until it is unsubscribed, over all reconnects."""
        if self.closed:
            raise BusUnavailable("the connection is closed")
        subscription = RawSubscription(subject, callback, self.counters)
        self._subscriptions.add(subscription)
        if self._client is not None:
            with contextlib.suppress(nats.errors.ConnectionClosedError):  # then it is made on the next client
                await self._start(subscription)
        return subscription

    async def drop(self, subscription: RawSubscription) -> None:
        """End a subscription."""
        self._subscriptions.discard(subscription)
        on_client, subscription.on_client = subscription.on_client, None
        if on_client is not None and self._client is not None:
            with contextlib.suppress(nats.errors.Error):  # the connection is gone, the subscription with it
                await self._client.unlisten(on_client)

    async def request(
        self, subject: str, data: bytes, timeout_s: float, headers: dict[str, str] | None = None
    ) -> Reply:
        """One try. Raises ``TimeoutError`` or ``Disconnected``, or ``BusUnavailable`` if closed."""
        if self.closed:
            raise BusUnavailable("the connection is closed")
        if not self._up.is_set():
            try:
                async with asyncio.timeout(timeout_s):
                    await self._up.wait()
            except TimeoutError:
                raise Disconnected from None
        reply, future = self.inbox.expect(timeout_s)
        try:
            self._now().send(subject, data, reply, headers)
            return await future
        except nats.errors.MaxPayloadError as error:
            raise BusError(f"{len(data)} bytes are more than the bus takes ({self.max_payload_bytes})") from error
        except nats.errors.Error as error:
            raise Disconnected from error
        finally:
            future.cancel()

    def publish(self, item: Outgoing) -> None:
        """Send it now if the server is there and takes it, else as soon as it does; in order."""
        if self._up.is_set() and not len(self.outbox) and self._client is not None and not self._client.congested:
            self._send(item)
        else:
            self.outbox.put(item)

    def send(self, subject: str, data: bytes, reply: str) -> None:
        """A message whose answers go to ``reply``, a subscribed subject; lost while the server is away."""
        try:
            self._now().send(subject, data, reply)
        except (nats.errors.Error, OSError, BusUnavailable) as error:
            self._lost(error)

    def defer(self, work: Callable[[], None]) -> None:
        """See ``Bus.defer``."""
        (self._client.defer if self._client is not None else asyncio.get_running_loop().call_soon)(work)

    async def round_trip_s(self, timeout_s: float = 2.0) -> float:
        """Send a message to ourselves.

        Not the client's own ping: it writes the PING past the publishes that it still buffers.
        """
        began = time.perf_counter()
        reply, future = self.inbox.expect(timeout_s)
        try:
            if not self._up.is_set():
                raise Disconnected
            self._now().send(reply, b"")
            await future
        except (Disconnected, TimeoutError, nats.errors.Error) as error:
            raise BusUnavailable("the bus does not answer") from error
        finally:
            future.cancel()
        return time.perf_counter() - began

    async def flush(self, timeout_s: float = 2.0) -> None:
        """Return once all publishes so far have reached the server; raises ``BusUnavailable``."""
        try:
            async with asyncio.timeout(timeout_s):
                await self.outbox.wait_drained()
        except TimeoutError:
            raise BusUnavailable("the bus is away") from None
        await self.round_trip_s(timeout_s)

    async def close(self) -> None:
        """Flush and disconnect; never raises."""
        if self.closed:
            return
        if self.connected:
            with contextlib.suppress(BusUnavailable):  # then what is left cannot be sent
                await self.flush()
        self.closed = True
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._close_client()
        self.inbox.disconnected()

    # -- the client ----------------------------------------------------------------------------------------------

    async def _connect(self, timeout_s: float) -> None:
        """Make a client, start every subscription on it."""
        callbacks = Callbacks(self._went_down, self._came_back, self._gave_up, self._on_error)
        client = await open_client(self._server, callbacks, self._pause_s(), timeout_s)
        self._client = client
        for subscription in list(self._subscriptions):
            await self._start(subscription)
        self._last_sign_s = time.monotonic()
        if client.is_connected:
            self._up.set()

    async def _start(self, subscription: RawSubscription) -> None:
        subscription.on_client = await self._now().listen(subscription.subject, subscription.receive)

    def _now(self) -> DirectClient:
        if self._client is None:
            raise BusUnavailable("the connection is not open")
        return self._client

    async def _close_client(self) -> None:
        client, self._client = self._client, None
        self._up.clear()
        if client is not None:
            await close_client(client)

    def _went_down(self, client: DirectClient) -> None:
        if client is not self._client:
            return
        if self.connected:
            logger.warning("disconnected from the bus")
        self._up.clear()
        self._last_sign_s = time.monotonic()
        self.inbox.disconnected()

    def _came_back(self, client: DirectClient) -> None:
        if client is not self._client:
            return
        self.reconnected_s = time.monotonic()
        self.counters.reconnects += 1
        logger.info("reconnected to the bus")
        self._up.set()
        self._spawn(self._run_hooks())

    def _gave_up(self, client: DirectClient) -> None:
        """The client closes itself on protocol errors such as a refused token; we go on with another."""
        if client is self._client and not self.closed:
            self._went_down(client)
            self._spawn(self._reopen())

    async def _run_hooks(self) -> None:
        for hook in list(self._hooks):
            try:
                await hook()
            except Exception:
                self.counters.handler_errors += 1
                logger.exception("a callback failed after a reconnect")

    async def _reopen(self) -> None:
        """Replace a client that closed itself."""
        await self._close_client()
        while not self.closed:
            try:
                await self._connect(5.0)
            except (OSError, nats.errors.Error, BusError, TimeoutError) as error:
                self._log_error(error)
                await asyncio.sleep(1.0)
                continue
            self._came_back(self._now())
            return

    async def _guard(self) -> None:
        """Replace a client whose reconnecting died: attempts that fail show up as errors, a dead task does not."""
        while True:
            await asyncio.sleep(1.0)
            silent = time.monotonic() - self._last_sign_s > _STALLED_S
            if not self._up.is_set() and self._client is not None and silent:
                logger.warning("the client does not try to reconnect: replacing it")
                await self._reopen()

    async def _on_error(self, error: Exception) -> None:
        self._last_sign_s = time.monotonic()
        self._log_error(error)

    def _log_error(self, error: Exception) -> None:
        now = time.monotonic()
        if now - self._last_log_s > _LOG_EVERY_S:
            self._last_log_s = now
            logger.warning("bus connection: %s", error_text(error))

    # -- the writer ----------------------------------------------------------------------------------------------

    async def _write(self) -> None:
        while True:
            await self.outbox.wait()
            await self._up.wait()
            while self._up.is_set() and (item := self.outbox.take()) is not None:
                self._send(item)
                if self._client is not None and self._client.congested:
                    with contextlib.suppress(OSError):  # then it is away, and what is left waits until it is back
                        await self._client.drain_writes()
            self.outbox.drained()

    def _send(self, item: Outgoing) -> None:
        reply = "" if item.no_responders is None else self.inbox.probe(item.no_responders)
        try:
            self._now().send(item.subject, item.data, reply)
        except (nats.errors.Error, OSError, BusUnavailable) as error:
            self._lost(error)

    def _lost(self, error: Exception) -> None:
        self.counters.dropped_publishes += 1
        self._log_error(error)

    def _pause_s(self) -> float:
        return random.uniform(*self.settings.reconnect_wait_s)

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
