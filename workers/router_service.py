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

from llmserve.bus.base import Bus, BusError
from llmserve.bus.flow.router import Deposed, Router
from llmserve.bus.flow.settings import RouterSettings
from llmserve.bus.membership import Beater
from llmserve.bus.messages import AnyMessage, Heartbeat, Role

logger = logging.getLogger(__name__)

BEAT_S = 0.25
LEADER_SILENT_S = 1.0
"""Taking over from a leader that lives after all costs a moment and loses nothing: epochs fence it."""


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
        self._heard = asyncio.Event()
        self._stopped = asyncio.Event()

    @property
    def leads(self) -> bool:
        return self._router is not None and self._router.epoch > 0

    async def run(self) -> None:
        """Stand by, lead, and stand by again when another router leads."""
        hearing = await self._bus.subscribe(self._bus.subjects.heartbeats, self._hear)
        self._beater.start()
        try:
            while not self._stopped.is_set():
                self._latest.current = CollectorRegistry()
                self._router = Router(self._bus, self._settings, self.member, registry=self._latest.current)
                await self._router.listen()
                await self._until_nobody_leads()
                await self._lead(self._router)
                self._router = None
        finally:
            await self._beater.stop()
            await hearing.unsubscribe()
            self._say_goodbye()

    async def stop(self) -> None:
        """Lead no more; another router takes over at once. ``run`` returns."""
        self._stopped.set()
        self._heard.set()
        if self._router is not None:
            await self._router.stop()

    async def _lead(self, router: Router) -> None:
        try:
            if not self._stopped.is_set():
                await router.start()
                self._beater.beat()
                await router.run()
        except Deposed as deposed:
            logger.warning("standing by: %s", deposed)
        finally:
            await router.stop()

    async def _until_nobody_leads(self) -> None:
        since_s = time.monotonic()
        while not self._stopped.is_set():
            try:
                leader, _ = await self._bus.leader()
            except BusError as error:
                logger.warning("the leader is not known: %s", error)
                # Silence counts from when the bus is back.
                since_s = time.monotonic()
                self._heard_s.clear()
            else:
                if not leader or leader == self.member:
                    return
                if time.monotonic() - self._heard_s.get(leader, since_s) >= LEADER_SILENT_S:
                    logger.warning("router %s is silent: taking over", leader)
                    return
            self._heard.clear()
            try:
                async with asyncio.timeout(BEAT_S):
                    await self._heard.wait()
            except TimeoutError:
                continue

    def _hear(self, message: AnyMessage) -> None:
        if not isinstance(message, Heartbeat) or message.role is not Role.ROUTER:
            return
        if message.leaving:
            self._heard_s[message.member] = float("-inf")
            self._heard.set()
        else:
            self._heard_s[message.member] = time.monotonic()

    def _heartbeat(self, *, leaving: bool = False) -> Heartbeat:
        return Heartbeat(
            member=self.member,
            role=Role.ROUTER,
            host=socket.gethostname(),
            pid=os.getpid(),
            epoch=self._router.epoch if self._router is not None else 0,
            leaving=leaving,
        )

    def _say_goodbye(self) -> None:
        try:
            self._bus.publish(self._bus.subjects.heartbeats, self._heartbeat(leaving=True))
        except BusError as error:
            logger.info("left without a word: %s", error)
