"""``llmserve-worker`` on a simulated engine that hangs as soon as it has work.

A thread of the process, as vLLM's core is on CPUs, enters C and never returns; ``HANG=held``: with the interpreter's
lock.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
from unittest.mock import patch

from llmserve.workers import service
from llmserve.workers.engine import vllm_thread
from llmserve.workers.engine.base import EngineInfo, Step, Work
from llmserve.workers.engine.simulated import SimulatedEngine
from llmserve.workers.engine.vllm_core import Pages
from llmserve.workers.engine.vllm_thread import ThreadCore
from llmserve.workers.main import main
from tests.workers.world import settings


class HangingCore:
    """As much of vLLM's ``EngineCore`` as the thread steps."""

    batch_queue = None

    class scheduler:
        @staticmethod
        def has_requests() -> bool:
            return False

    @staticmethod
    def abort_requests(_: list[str]) -> None:
        c = (ctypes.PyDLL if os.environ["HANG"] == "held" else ctypes.CDLL)(None)
        c.pause()

    def shutdown(self) -> None: ...


class HangingThreadCore(ThreadCore):
    def _create(self) -> tuple[HangingCore, Pages]:
        return HangingCore(), Pages(1, 1, 1, "")


class HangingEngine(SimulatedEngine):
    async def start(self) -> EngineInfo:
        self._core = HangingThreadCore(config=None, threads=1)
        await self._core.start(lambda _: None)
        return await super().start()

    def submit(self, work: Work) -> None:
        super().submit(work)
        self._core.abort([work.work_id])  # which is what makes it hang

    async def step(self) -> Step:
        await asyncio.Event().wait()
        raise AssertionError

    async def close(self) -> None:
        await super().close()
        await self._core.close()


def make_engine(*_: object, **__: object) -> HangingEngine:
    return HangingEngine(settings())


if __name__ == "__main__":
    with patch.object(service, "make_engine", make_engine), patch.object(vllm_thread, "_JOIN_S", 0.5):
        sys.exit(main())
