"""Limits hold over all gateways: each reports what it let through, and takes from its buckets what others report."""

from __future__ import annotations

import asyncio
import logging
import time

from llmserve.bus.base import Bus, BusError, Subscription
from llmserve.bus.messages import AnyMessage, Spending, TenantSpending
from llmserve.gateway.limits import Spent, TenantLimits

log = logging.getLogger(__name__)

REPORT_S = 1.0


class SpendingReports:
    """Run between ``start`` and ``stop``."""

    def __init__(self, bus: Bus, member_id: str, limits: TenantLimits) -> None:
        self._bus = bus
        self._member_id = member_id
        self._limits = limits
        self._was_open: set[str] = set()
        self._subscription: Subscription | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._subscription = await self._bus.subscribe(self._bus.subjects.spending, self._hear)
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._subscription is not None:
            await self._subscription.unsubscribe()

    def report(self) -> None:
        """Tell the others what changed since the last report."""
        changed = []
        for limiter in self._limits.all():
            spent, limiter.spent = limiter.spent, Spent()
            # The end of the last open request is told too.
            if spent != Spent() or limiter.open or limiter.tenant in self._was_open:
                changed.append(TenantSpending(limiter.tenant, spent.requests, spent.tokens, limiter.open))
        self._was_open = {item.tenant for item in changed if item.open_requests}
        if changed:
            self._bus.publish(self._bus.subjects.spending, Spending(gateway=self._member_id, tenants=changed))

    def _hear(self, message: AnyMessage) -> None:
        if not isinstance(message, Spending) or message.gateway == self._member_id:
            return
        now = time.monotonic()
        for item in message.tenants:
            limiter = self._limits.of(item.tenant)
            if limiter is not None:
                limiter.heard(message.gateway, item.requests, item.tokens, item.open_requests, now)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(REPORT_S)
            try:
                self.report()
            except BusError as error:
                log.warning("limits are not shared with other gateways for now: %s", error)
