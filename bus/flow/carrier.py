"""Carries out on the bus what the router's core wants done."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable

from llmserve.bus.base import Bus, BusError
from llmserve.bus.flow.actions import (
    Action,
    AskSnapshot,
    Broadcast,
    CheckStored,
    Discard,
    NotifyGateway,
    SendAhead,
    SendGrant,
)
from llmserve.bus.flow.events import Absent, Checked, NoResponders
from llmserve.bus.flow.ledger import Ledger
from llmserve.bus.flow.metrics import FlowMetrics
from llmserve.bus.messages import KvResync, Ping

logger = logging.getLogger(__name__)

RETRY_S = 0.5
PARALLEL_CALLS = 32
"""Requests to the bus at once, for discards and checks."""


class Carrier:
    """``handle`` gets what comes of an action: an answer of the stream, or that nobody listens."""

    def __init__(
        self,
        bus: Bus,
        member: str,
        metrics: FlowMetrics,
        handle: Callable[[NoResponders | Absent | Checked], None],
    ) -> None:
        self._bus = bus
        self._member = member
        self._metrics = metrics
        self._handle = handle
        self._tasks: set[asyncio.Task[None]] = set()
        self._calls = asyncio.Semaphore(PARALLEL_CALLS)

    def act(self, actions: Iterable[Action], *, leads: bool) -> None:
        """Carry out all of them if this router leads, else what only it needs to know."""
        for action in actions:
            if not leads and not isinstance(action, CheckStored):
                continue  # the leader does it
            try:
                self._carry_out(action)
            except BusError as error:
                self.failed(type(action).__name__, error)

    def ping_members(self, ledger: Ledger) -> None:
        """Find out who is gone before its silence tells."""
        ping, subjects = Ping(member=self._member), self._bus.subjects
        places = [(name, subjects.work(name)) for name in ledger.workers]
        places += [(name, subjects.gateway(name)) for name in ledger.gateways]
        for name, subject in places:
            self._ping(subject, ping, Absent(name))

    def failed(self, what: str, error: Exception) -> None:
        """Count and log it."""
        self._metrics.failed(what)
        unexpected = not isinstance(error, BusError)
        logger.error("router %s: %s failed: %s", self._member, what, error, exc_info=unexpected)

    async def stop(self) -> None:
        """Give up what is still on its way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _carry_out(self, action: Action) -> None:
        subjects = self._bus.subjects
        if isinstance(action, SendGrant):
            self._send_grant(action)
        elif isinstance(action, SendAhead):
            self._bus.publish(subjects.work(action.worker), action.grant)
        elif isinstance(action, NotifyGateway):
            self._bus.publish(subjects.gateway(action.gateway), action.message)
        elif isinstance(action, Broadcast):
            self._bus.publish(subjects.control, action.message)
        elif isinstance(action, AskSnapshot):
            self._bus.publish(subjects.kv_resync(action.member), KvResync(router=self._member))
        elif isinstance(action, Discard):
            self._spawn(self._discard(action.seq))
        elif isinstance(action, CheckStored):
            self._spawn(self._check_stored(action.seq))

    def _send_grant(self, action: SendGrant) -> None:
        worker, seq = action.worker, action.grant.seq
        nobody = NoResponders(worker, seq)
        self._bus.publish(self._bus.subjects.work(worker), action.grant, no_responders=lambda: self._handle(nobody))
        self._metrics.granted(action)

    def _ping(self, subject: str, ping: Ping, absent: Absent) -> None:
        try:
            self._bus.publish(subject, ping, no_responders=lambda: self._handle(absent))
        except BusError as error:
            self.failed("ping", error)

    async def _discard(self, seq: int) -> None:
        """Until it is done: nobody else would take the request off the stream."""
        while True:
            try:
                async with self._calls:
                    await self._bus.discard(seq)
                return
            except BusError as error:
                self.failed("Discard", error)
                await asyncio.sleep(RETRY_S)

    async def _check_stored(self, seq: int) -> None:
        stored: bool | None = None
        try:
            async with self._calls:
                stored = await self._bus.fetch(seq) is not None
        except BusError as error:
            self.failed("CheckStored", error)
        self._handle(Checked(seq, stored))

    def _spawn(self, call: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(call)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
