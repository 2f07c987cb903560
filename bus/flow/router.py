"""The router: the core's events from the bus, and the leadership over a deployment."""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry

from llmserve.bus.base import Bus, BusError, Follower, Subscription
from llmserve.bus.flow.bus_watch import BusWatch
from llmserve.bus.flow.carrier import RETRY_S, Carrier
from llmserve.bus.flow.core import RouterCore
from llmserve.bus.flow.events import Event, Reconnected, StreamRead, Tick, Told
from llmserve.bus.flow.metrics import FlowMetrics
from llmserve.bus.flow.placement import Placement
from llmserve.bus.flow.settings import RouterSettings
from llmserve.bus.messages import Accepted, AnyMessage, Cancel, Sync

logger = logging.getLogger(__name__)

TICK_S = 0.25
STALL_S = 1.5
"""A leader that did nothing for so long may have been replaced, and has heard nobody."""
READ_STREAM_S = 30.0
"""Between two comparisons of what is known with what is stored."""
LEADER_POLL_S = 1.0
SYNC_POLL_S = 0.01
SYNC_PING_S = 0.1


class Deposed(Exception):
    """Another router leads."""

    def __init__(self, router: str, epoch: int) -> None:
        super().__init__(f"router {router!r} leads in epoch {epoch}")
        self.router = router
        self.epoch = epoch


class Router:
    """Stands by from ``listen`` on, leads a deployment's flow from ``start`` until ``stop``, or until it is deposed.

    A standby knows what the leader knows: it follows the same stream and hears the same messages, and tells nobody
    what it makes of them. ``member`` is its own member id. Membership heartbeats of the router itself are the
    caller's.
    """

    def __init__(
        self,
        bus: Bus,
        settings: RouterSettings,
        member: str,
        *,
        registry: CollectorRegistry | None = None,
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
        placement: Placement | None = None,
    ) -> None:
        """``placement``: by locality if not given."""
        self.core = RouterCore(settings, rng or random.Random(), placement)
        self.metrics = FlowMetrics(registry or CollectorRegistry())
        self._bus = bus
        self._member = member
        self._clock = clock
        self._granting = False
        self._pump_due = False
        self._wake_timer: asyncio.TimerHandle | None = None
        self._subscriptions: list[Subscription] = []
        self._follower: Follower | None = None
        self._carrier = Carrier(bus, member, self.metrics, self._handle)
        self.watch = BusWatch(bus, member, clock)
        self._back_s = -math.inf
        """The last return of the bus that the core was told of."""
        self._deposed: Deposed | None = None
        self._wake = asyncio.Event()
        self._stopped = False

    @property
    def epoch(self) -> int:
        """Of this leadership; 0 before ``start``."""
        return self.core.epoch

    @property
    def leads(self) -> bool:
        return self.epoch > 0 and self._deposed is None and not self._stopped

    async def listen(self) -> None:
        """Hear heartbeats and events and follow the stream without leading. Raises ``BusUnavailable``."""
        if self._subscriptions:
            return
        subjects = self._bus.subjects
        for subject in (subjects.heartbeats, subjects.events, subjects.control, subjects.kv_events):
            self._subscriptions.append(await self._bus.subscribe(subject, self._on_message))
        self._follower = await self._bus.follow(self._handle)
        self._subscriptions.append(self._follower)
        await self.watch.start()

    def stand_by(self) -> None:
        """Call a few times a second while another router leads."""
        self._tick()

    def _tick(self) -> None:
        """While the bus is away time does not pass: nobody can be heard, and nothing be said."""
        if self.watch.carries:
            self._handle(Tick())

    async def start(self, over: int | None = None) -> None:
        """Take the leadership, of the leader of epoch ``over`` if it is given, learn what runs where, and begin to
        grant.

        Raises ``BusUnavailable``, or ``Overtaken`` and stays a standby.
        """
        await self.listen()
        known = set(self.core.ledger.workers)
        self.core.begin(self._member, await self._bus.lead(self._member, over))
        self._bus.publish(self._bus.subjects.control, Sync(epoch=self.epoch, router=self._member))
        if self._follower is not None:
            await self._follower.caught_up()
        await self._read_stream()
        await self._synced(known)
        self._granting = self._deposed is None
        self._schedule_pump()
        entries, workers = len(self.core.ledger.entries), len(self.core.ledger.workers)
        logger.info(
            "router %s leads in epoch %d: %d requests, %d workers", self._member, self.epoch, entries, workers
        )

    async def run(self) -> None:
        """Keep time until ``stop``. Raises ``Deposed`` when another router leads: this one grants nothing more."""
        watches = [asyncio.create_task(watch) for watch in (self._watch_leader(), self._watch_stream())]
        ticks, last_s = 0, time.monotonic()
        try:
            while not self._stopped and self._deposed is None:
                try:
                    await asyncio.wait_for(self._wake.wait(), TICK_S)
                except TimeoutError:
                    stalled_s, last_s = time.monotonic() - last_s, time.monotonic()
                    if stalled_s > STALL_S:
                        await self._recover(stalled_s)
                        last_s = time.monotonic()
                        continue
                    self._tick()
                    self._carrier.ping_members(self.core.ledger)
                    ticks += 1
                    if ticks % 4 == 0:
                        self.metrics.update(self.core)
        finally:
            for watch in watches:
                watch.cancel()
            await asyncio.gather(*watches, return_exceptions=True)
            self._granting = False
        if self._deposed is not None:
            raise self._deposed

    async def _recover(self, stalled_s: float) -> None:
        """This process stood still. Its silence says nothing about the others, and another may lead by now."""
        logger.warning("router %s stood still for %.1f s", self._member, stalled_s)
        self._granting = False
        while self._deposed is None and not self._stopped:
            try:
                router, epoch = await self._bus.leader()
            except BusError as error:
                self._carrier.failed("leader", error)
                await asyncio.sleep(RETRY_S)
                continue
            if epoch > self.epoch:
                self._stand_down(Deposed(router, epoch))
                return
            self._handle(Reconnected())
            self._granting = True
            return

    async def stop(self) -> None:
        """Stop granting and hearing; what runs on workers goes on."""
        self._stopped, self._granting = True, False
        self._wake.set()
        for subscription in self._subscriptions:
            try:
                await subscription.unsubscribe()
            except BusError as error:
                self._carrier.failed("unsubscribe", error)
        self._subscriptions.clear()
        try:
            await self.watch.stop()
        except BusError as error:
            self._carrier.failed("unsubscribe", error)
        await self._carrier.stop()

    # -- events in ------------------------------------------------------------------------------------------------

    def _on_message(self, message: AnyMessage) -> None:
        if isinstance(message, Sync):
            if message.epoch > self.epoch > 0:
                self._stand_down(Deposed(message.router, message.epoch))
        elif isinstance(message, Cancel) and 0 < message.epoch < self.epoch:
            logger.warning("a deposed router's cancellation is not heard: epoch %d is over", message.epoch)
        elif isinstance(message, Told):
            self._handle(message)

    def _handle(self, event: Event) -> None:
        if self._stopped or self._deposed is not None:
            return
        if self.watch.back_s > self._back_s:
            self._back_s = self.watch.back_s
            self._handle(Reconnected())
        try:
            self._carrier.act(self.core.handle(event, self._clock()), leads=self.leads)
        except Exception as error:  # an error here must not end the subscription that called
            self._carrier.failed(type(event).__name__, error)
        if not isinstance(event, Accepted):  # which makes no room
            self._schedule_pump()

    def _schedule_pump(self) -> None:
        if self._granting and not self._pump_due:
            self._pump_due = True
            self._bus.defer(self._pump)

    def _pump(self) -> None:
        self._pump_due = False
        if not self._granting:
            return
        try:
            now_s = self._clock()
            self._carrier.act(self.core.dispatch(now_s), leads=self.leads)
            self._wake_at(now_s)
        except Exception as error:  # as above
            self._carrier.failed("dispatch", error)

    def _wake_at(self, now_s: float) -> None:
        """Dispatch again when the core says so, though nothing happens before."""
        if self._wake_timer is not None:
            self._wake_timer.cancel()
            self._wake_timer = None
        if self.core.wake_s is not None:
            loop = asyncio.get_running_loop()
            self._wake_timer = loop.call_later(max(0.0, self.core.wake_s - now_s), self._schedule_pump)

    # -- leadership -----------------------------------------------------------------------------------------------

    async def _synced(self, known: set[str]) -> None:
        """Return once nothing that runs somewhere can be granted again: every worker answered, or time is up.

        A router that did not listen before cannot know who is missing, so it gives the whole time to workers that
        may run what nobody has claimed yet.
        """
        members = self.core.members
        deadline_s = self._clock() + self.core.settings.sync_wait_s
        ping_s = 0.0
        while members.unclaimed() and self._clock() < deadline_s and self._deposed is None:
            if known and not members.unanswered(self.epoch):
                return
            if self._clock() >= ping_s:  # who died with the old leader does not answer
                self._carrier.ping_members(self.core.ledger)
                ping_s = self._clock() + SYNC_PING_S
            await asyncio.sleep(SYNC_POLL_S)

    async def _read_stream(self) -> None:
        """Hold what is known against what is stored: nothing may be missing, and nothing be there that is over."""
        contents = await self._bus.contents()
        self._handle(StreamRead(contents.last_seq, contents.seqs))
        for seq in sorted(contents.seqs):
            if self.core.knows(seq):
                continue
            stored = await self._bus.fetch(seq)
            if stored is not None:
                self._handle(stored)

    async def _watch_stream(self) -> None:
        while True:
            await asyncio.sleep(READ_STREAM_S)
            try:
                await self._read_stream()
            except BusError as error:
                self._carrier.failed("contents", error)

    async def _watch_leader(self) -> None:
        while True:
            await asyncio.sleep(LEADER_POLL_S)
            try:
                router, epoch = await self._bus.leader()
            except BusError as error:
                self._carrier.failed("leader", error)
                continue
            if epoch > self.epoch:
                self._stand_down(Deposed(router, epoch))

    def _stand_down(self, deposed: Deposed) -> None:
        if self._deposed is None:
            logger.warning("router %s stands down: %s", self._member, deposed)
            self._deposed, self._granting = deposed, False
            self._wake.set()
