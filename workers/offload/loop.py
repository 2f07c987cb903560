"""A thread with an event loop, to which another thread throws work that it must not wait for."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine
from typing import Any

logger = logging.getLogger("vllm.llmserve.tiers")

_CLOSE_S = 5.0


class LoopThread:
    """``begin`` and ``call`` may be called from any thread, also before ``start``: then they wait for it."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        self._thread.start()

    def begin(self, job: Coroutine[Any, Any, None]) -> None:
        """Run ``job``, which must handle its own errors."""
        self._loop.call_soon_threadsafe(self._begin, job)

    def call(self, callback: Callable[..., object], *args: object) -> None:
        self._loop.call_soon_threadsafe(callback, *args)

    def every(self, seconds: float, callback: Callable[[], object]) -> None:
        """Call it at intervals until the end."""

        def again() -> None:
            callback()
            self._loop.call_later(seconds, again)

        self.call(again)

    def stop(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Give what runs some seconds to end, run ``last``, end the thread."""
        if not self._thread.is_alive():
            self._loop.close()
            return
        closing = asyncio.run_coroutine_threadsafe(self._close(last), self._loop)
        try:
            closing.result(_CLOSE_S)
        except Exception:
            logger.exception("the tiers did not close in time")
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CLOSE_S)

    async def _close(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        if self._tasks:
            # What is encoded is still written, if it can be at once.
            _, late = await asyncio.wait(set(self._tasks), timeout=_CLOSE_S / 2)
            for task in late:
                task.cancel()
        await last()

    def _begin(self, job: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(job)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.close()
