"""A router as a process of its own: a standby until nobody leads, then the leader until another does."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from llmserve.bus.base import Bus, BusError, Overtaken
from llmserve.bus.flow.bus_watch import BusWatch
from llmserve.bus.flow.router import Deposed, Router
from llmserve.bus.flow.settings import RouterSettings
from llmserve.bus.membership import Beater
from llmserve.bus.messages import AnyMessage, Heartbeat, Ping, Role

logger = logging.getLogger(__name__)

BEAT_S = 0.25
PROBE_S = 0.05
"""Between two pings of a standby to the leader: the server tells at once if nobody listens there any more."""
READ_LEADER_S = 0.25
LEADER_SILENT_S = 3.0
"""Of a leader that hangs. Less would take a host's hiccup for a death; the leader itself is fenced by its epoch."""
RETURN_S = 1.0
"""After a reconnect the leader may still be on its way back: nobody listening there means nothing."""


class LatestRegistry(Collector):
    """Shows the metrics of the current leadership: each one counts anew, on a registry of its own."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.current = CollectorRegistry()
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        yield from self.current.collect()


class RouterService:
    """Run ``run`` until ``stop``. It raises ``BusError`` only if the bus is closed."""

    def __init__(self, bus: Bus, settings: RouterSettings, registry: CollectorRegistry, name: str = "router") -> None:
        self.member = f"{name}-{secrets.token_hex(4)}"
        self._bus = bus
        self._settings = settings
        self._latest = LatestRegistry(registry)
        self._router: Router | None = None
        self._beater = Beater(bus, self._heartbeat, BEAT_S)
        self._heard_s: dict[str, float] = {}
        self._absent: set[str] = set()
        """Routers at whose subject nobody listens."""
        self._heard = asyncio.Event()
        self._stopped = asyncio.Event()

    @property
    def leads(self) -> bool:
        return self._router is not None and self._router.leads

    async def run(self) -> None:
        """Stand by, lead, and stand by again when another router leads."""
        subjects = self._bus.subjects
        hearing = [
            await self._bus.subscribe(subjects.heartbeats, self._hear),
            await self._bus.subscribe(subjects.router(self.member), lambda _: None),
        ]
        self._beater.start()
        try:
            while not self._stopped.is_set():
                await self._serve()
        finally:
            await self._beater.stop()
            for subscription in hearing:
                await subscription.unsubscribe()
            self._say_goodbye()

    async def _serve(self) -> None:
        """One turn: follow the leader, take over from it, lead until another router does."""
        self._latest.current = CollectorRegistry()
        router = self._router = Router(self._bus, self._settings, self.member, registry=self._latest.current)
        try:
            await router.listen()
            if await self._take_over(router):
                self._beater.beat()
                await router.run()
        except Deposed as deposed:
            logger.warning("standing by: %s", deposed)
        except BusError as error:
            if self._bus.closed:
                raise
            logger.error("cannot lead or stand by, trying again: %s", error)
            await asyncio.sleep(READ_LEADER_S)
        finally:
            await router.stop()
            self._router = None

    async def stop(self) -> None:
        """Lead no more; another router takes over at once. ``run`` returns."""
        self._stopped.set()
        self._heard.set()
        if self._router is not None:
            await self._router.stop()

    async def _take_over(self, router: Router) -> bool:
        """Stand by until the leader is gone, and lead; False if ``stop`` was called before."""
        while True:
            over = await self._until_nobody_leads(router)
            if over is None:
                return False
            try:
                await router.start(over)
            except Overtaken as error:
                logger.info("another standby was faster: %s", error)
            else:
                return True

    async def _until_nobody_leads(self, router: Router) -> int | None:
        """The epoch of the leader that is gone; None if ``stop`` was called."""
        since_s = time.monotonic()
        leader, epoch, read_s = "", 0, float("-inf")
        while not self._stopped.is_set():
            if time.monotonic() - read_s >= READ_LEADER_S:
                try:
                    leader, epoch = await self._bus.leader()
                except BusError as error:
                    if self._bus.closed:
                        raise
                    logger.warning("the leader is not known: %s", error)
                    # Silence counts from when the bus is back.
                    since_s = time.monotonic()
                    self._heard_s.clear()
                    continue
                read_s = time.monotonic()
                router.stand_by()
            if cause := self._vacancy(leader, since_s, router.watch):
                logger.warning("taking over from router %r, epoch %d: %s", leader, epoch, cause)
                return epoch
            self._probe(leader, router.watch)
            self._heard.clear()
            try:
                async with asyncio.timeout(PROBE_S):
                    await self._heard.wait()
            except TimeoutError:
                continue
        return None

    def _vacancy(self, leader: str, since_s: float, watch: BusWatch) -> str:
        """Why ``leader``, heard or awaited since ``since_s``, does not lead; empty if it does."""
        if not leader:
            return "nobody led before"
        if leader == self.member:
            return "it is this one"
        if leader in self._absent:
            return "nobody listens there"
        if self._heard_s.get(leader) == float("-inf"):
            return "it left"
        heard_s = max(self._heard_s.get(leader, since_s), watch.back_s)
        silent = watch.carries and time.monotonic() - heard_s >= LEADER_SILENT_S
        return "it is silent" if silent else ""

    def _probe(self, leader: str, watch: BusWatch) -> None:
        def nobody() -> None:
            if watch.carries and time.monotonic() - watch.back_s >= RETURN_S:
                self._absent.add(leader)
                self._heard.set()

        try:
            self._bus.publish(self._bus.subjects.router(leader), Ping(member=self.member), no_responders=nobody)
        except BusError as error:
            logger.warning("the leader cannot be probed: %s", error)

    def _hear(self, message: AnyMessage) -> None:
        if not isinstance(message, Heartbeat) or message.role is not Role.ROUTER:
            return
        if message.leaving:
            self._heard_s[message.member] = float("-inf")
            self._heard.set()
        else:
            self._heard_s[message.member] = time.monotonic()
            self._absent.discard(message.member)

    def _heartbeat(self, *, leaving: bool = False) -> Heartbeat:
        return Heartbeat(
            member=self.member,
            role=Role.ROUTER,
            host=socket.gethostname(),
            pid=os.getpid(),
            epoch=self._router.epoch if self._router is not None else 0,
            leaving=leaving,
            cache=self._router.core.locality.summary() if self._router is not None else "",
        )

    def _say_goodbye(self) -> None:
        try:
            self._bus.publish(self._bus.subjects.heartbeats, self._heartbeat(leaving=True))
        except BusError as error:
            logger.info("left without a word: %s", error)
