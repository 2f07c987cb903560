"""Records the results of requests that are over: several at once, each until the bus has it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable

from llmserve.bus.base import Bus, BusError
from llmserve.workers.actions import Action, Complete
from llmserve.workers.metrics import OneWorker
from llmserve.workers.state import WorkerState

logger = logging.getLogger(__name__)


class Completions:
    """A queue of results between ``start`` and ``stop``; ``act`` carries out what follows from each."""

    def __init__(
        self, bus: Bus, state: WorkerState, act: Callable[[Iterable[Action]], None], metrics: OneWorker
    ) -> None:
        self._bus = bus
        self._state = state
        self._act = act
        self._metrics = metrics
        self._queue: asyncio.Queue[Complete] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, at_once: int) -> None:
        self._tasks = [asyncio.create_task(self._run()) for _ in range(at_once)]

    def add(self, action: Complete) -> None:
        self._queue.put_nowait(action)

    async def recorded(self) -> None:
        """Return when nothing is left to record."""
        await self._queue.join()

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            action = await self._queue.get()
            try:
                await self._record(action)
            finally:
                self._queue.task_done()

    async def _record(self, action: Complete) -> None:
        task, result = action.task, action.result
        try:
            recorded = await self._bus.finish(task.seq, task.tenant, result)
        except BusError as error:
            self._metrics.failed("finish")
            logger.error("request %s: finish failed: %s", result.request_id, error)
            cause = f"its result cannot be recorded: {error}"
            self._act(self._state.not_completed(task, cause, time.monotonic()))
            return
        if not recorded:
            logger.info("another completion was first", extra={"request_id": result.request_id})
        self._act(self._state.completed(task, result.reason, time.monotonic()))
