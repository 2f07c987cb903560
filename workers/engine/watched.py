"""An engine that hangs while its worker lives: a stopped process, a device or a step that never returns.

Nothing else would tell: the worker's heartbeats go on. The engine counts the steps that end in it, those that yield
nothing included. With work in it and none of them for ``stall_s`` it is called dead; what ran there runs elsewhere.
"""

from __future__ import annotations

import asyncio
import time

from llmserve.workers.engine.base import Engine, EngineDied, EngineInfo, EngineLoad, Step, Work

_LOOKS = 8
"""In ``stall_s``."""
_LOOK_S = 1.0
"""Between two looks at most."""


class EngineStalled(EngineDied):
    """No step has ended for too long."""


class Stall:
    """How long an engine with work has made no progress. No I/O."""

    def __init__(self, now_s: float) -> None:
        self.stalled_s = 0.0
        self._steps = -1
        self._looked_s = now_s

    def look(self, busy: bool, steps: int, now_s: float, most_s: float) -> float:
        """The same ``stalled_s``. ``most_s``: what counts of the time since the last look. If that was longer, this
        process stood still itself, and the engine may have with it."""
        passed_s = min(now_s - self._looked_s, most_s)
        self.stalled_s = self.stalled_s + passed_s if busy and steps == self._steps else 0.0
        self._steps, self._looked_s = steps, now_s
        return self.stalled_s


class WatchedEngine(Engine):
    """``engine``, whose ``step`` raises ``EngineStalled`` when it hangs. It still has to be closed."""

    def __init__(self, engine: Engine, stall_s: float) -> None:
        self._engine = engine
        self._stall_s = stall_s
        self._work: set[str] = set()
        """What its steps are expected to end."""
        self._stepping: asyncio.Task[object] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._stalled = ""

    async def start(self) -> EngineInfo:
        info = await self._engine.start()
        self._watching = asyncio.create_task(self._watch())
        return info

    def submit(self, work: Work) -> None:
        if self._stalled:
            raise EngineStalled(self._stalled)
        self._engine.submit(work)
        if not work.ahead:
            self._work.add(work.work_id)

    def abort(self, work_ids: list[str]) -> None:
        self._engine.abort(work_ids)

    async def step(self) -> Step:
        if self._stalled:
            raise EngineStalled(self._stalled)
        self._stepping = asyncio.current_task()
        try:
            step = await self._engine.step()
        except asyncio.CancelledError:
            if self._stalled and self._stepping is not None and not self._stepping.uncancel():
                raise EngineStalled(self._stalled) from None
            raise
        finally:
            self._stepping = None
        for output in step.outputs:
            if output.reason is not None or output.handoff:
                self._work.discard(output.work_id)
        return step

    def load(self) -> EngineLoad:
        return self._engine.load()

    async def close(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        await self._engine.close()

    async def _watch(self) -> None:
        pause_s = min(_LOOK_S, self._stall_s / _LOOKS)
        stall = Stall(time.monotonic())
        while stall.look(bool(self._work), self.load().steps, time.monotonic(), 2 * pause_s) < self._stall_s:
            await asyncio.sleep(pause_s)
        self._stalled = f"it hangs: {len(self._work)} requests, and no step has ended for {self._stall_s:g} s"
        if self._stepping is not None:
            self._stepping.cancel()
