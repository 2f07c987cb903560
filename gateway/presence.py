"""Whether the client is still there: one task for a whole request, for whoever has to know at the time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

T = TypeVar("T")


class Presence:
    """Reads ``receive`` from now on; the body must have been read."""

    def __init__(self, receive: Receive) -> None:
        self.gone = False
        self._tell: Callable[[], object] | None = None
        self._task = asyncio.get_running_loop().create_task(self._watch(receive))

    async def cancels(self, work: Coroutine[Any, Any, T]) -> T | None:
        """What ``work`` returns; None if the client goes before: then it is cancelled."""
        task = asyncio.current_task()
        assert task is not None
        self._tell = task.cancel
        try:
            return await work
        except asyncio.CancelledError:
            if not self.gone:
                raise
            task.uncancel()
            return None
        finally:
            self._tell = None

    def tells(self, callback: Callable[[], object]) -> None:
        """Call ``callback`` when the client goes, at once if it has."""
        if self.gone:
            callback()
        else:
            self._tell = callback

    def stop(self) -> None:
        """Nobody wants to know any more."""
        self._tell = None
        self._task.cancel()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        if self._tell is not None:
            self._tell()
