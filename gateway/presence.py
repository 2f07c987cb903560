"""Whether the client is still there, for whoever has to know at the time.

The server's connection tells, or, where there is none, one task for a whole request reads for its end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from starlette.types import Receive, Scope

from llmserve.gateway.caller import current_caller
from llmserve.gateway.http_protocol import watch_of

T = TypeVar("T")


class Presence:
    """Nothing else may read ``receive`` from now on; the body must have been read."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self.gone = False
        # The server tells it outside of the request's context.
        self._caller = current_caller.get()
        self._tell: Callable[[], object] | None = None
        self._task: asyncio.Task[None] | None = None
        self._watch = watch_of(scope)
        if self._watch is not None:
            self._watch(self._leave)
        else:
            self._task = asyncio.get_running_loop().create_task(self._read(receive))

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
        if self._watch is not None:
            self._watch(None)
        if self._task is not None:
            self._task.cancel()

    async def _read(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._leave()

    def _leave(self) -> None:
        self.gone = True
        if self._caller is not None:
            self._caller.disconnected = True
        if self._tell is not None:
            self._tell()
