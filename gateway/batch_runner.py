"""Takes batches and holds them: one whose lease is not renewed goes to another gateway."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass

from llmserve.bus.base import BusError
from llmserve.bus.keyvalue import Entry
from llmserve.gateway import batch_lease
from llmserve.gateway.batch_lease import Lease, LeaseLost
from llmserve.gateway.batch_run import BatchRun
from llmserve.gateway.batch_store import BatchStore, NotFound, TooLong
from llmserve.gateway.executor import Executor
from llmserve.gateway.metrics import GatewayMetrics

log = logging.getLogger(__name__)

LOOK_S = 1.0
AT_ONCE = 8
"""Batches that one gateway runs at once."""


@dataclass(slots=True)
class _Seen:
    revision: int
    since_s: float


class BatchRunner:
    """Takes and runs batches between ``start`` and ``stop``."""

    def __init__(
        self, store: BatchStore, executor: Executor, member_id: str, metrics: GatewayMetrics, concurrency: int
    ) -> None:
        self._store = store
        self._executor = executor
        self._member_id = member_id
        self._metrics = metrics
        self._concurrency = concurrency
        self._running: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._seen: dict[tuple[str, str], _Seen] = {}
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._look_forever())

    async def stop(self) -> None:
        """Leave what runs to another gateway."""
        tasks = [*self._running.values(), *([self._task] if self._task is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def look(self) -> None:
        """There may be a new batch, or one that is cancelled."""
        self._wake.set()

    async def _look_forever(self) -> None:
        while True:
            self._wake.clear()
            try:
                await self._look()
            except BusError as error:
                log.warning("batches cannot be looked up: %s", error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._wake.wait()

    async def _look(self) -> None:
        now = time.monotonic()
        unfinished = await self._store.unfinished()
        self._seen = {key: seen for key, seen in self._seen.items() if key in unfinished}
        for key, entry in unfinished.items():
            if key in self._running or len(self._running) >= AT_ONCE:
                continue
            seen = self._seen.get(key)
            if seen is None or seen.revision != entry.revision:
                seen = self._seen[key] = _Seen(entry.revision, now)
            if not entry.value or now - seen.since_s > batch_lease.LOST_AFTER_S:
                await self._take(*key, entry)

    async def _take(self, tenant: str, batch_id: str, entry: Entry) -> None:
        lease = Lease(self._store, tenant, batch_id, self._member_id, entry.revision)
        if not await lease.take():
            return
        if entry.value:
            log.warning("batch %s is taken over", batch_id, extra={"tenant": tenant})
            self._metrics.batch_takeovers.inc()
        task = asyncio.create_task(self._hold(tenant, batch_id, lease))
        self._running[tenant, batch_id] = task
        task.add_done_callback(lambda _: self._running.pop((tenant, batch_id), None))

    async def _hold(self, tenant: str, batch_id: str, lease: Lease) -> None:
        """Run the batch while the lease is ours, then give the lease up."""
        run = BatchRun(self._store, self._executor, self._metrics, self._concurrency, tenant, batch_id)
        working = asyncio.create_task(run.run())
        holding = asyncio.create_task(lease.renew_forever())
        ended = False
        try:
            await asyncio.wait((working, holding), return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
                ended = True
            else:
                holding.result()
        except LeaseLost:
            log.warning("batch %s has gone to another gateway", batch_id, extra={"tenant": tenant})
        except NotFound:
            ended = True
        except (BusError, TooLong) as error:
            log.warning("batch %s is left for later: %r", batch_id, error, extra={"tenant": tenant})
        except Exception:
            log.exception("batch %s failed, it will be tried again", batch_id, extra={"tenant": tenant})
            await asyncio.sleep(LOOK_S)
        finally:
            for task in (working, holding):
                task.cancel()
            await asyncio.gather(working, holding, return_exceptions=True)
            # Even while this task is cancelled, so that another gateway need not wait.
            with contextlib.suppress(BusError, TimeoutError):
                async with asyncio.timeout(3):
                    await (lease.end() if ended else lease.release())
