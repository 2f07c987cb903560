"""The engine core in a thread of this process: half the start-up time and memory of a child, for CPUs and tests.

vLLM keeps its parallel state in globals, so that a process can hold one such engine.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
from typing import TYPE_CHECKING, Any

from llmserve.workers.engine.base import EngineError
from llmserve.workers.engine.vllm_core import Core, Pages, pages_of, refused

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import EventPublisher, KVEventBatch
    from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
    from vllm.v1.engine.core import EngineCore

    from llmserve.workers.engine.vllm_core import Sink

logger = logging.getLogger(__name__)

_BUSY_POLL_S = 0.001
"""While a request waits for its pages."""
_HELD_POLL_S = 0.005
"""While pages are held for others and nothing else is to be done."""
_JOIN_S = 8.0


class ThreadCore(Core):
    """Steps an ``EngineCore`` in a thread of its own."""

    def __init__(self, config: VllmConfig, threads: int) -> None:
        self._config = config
        self._threads = threads
        self._inbox: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._sink: Sink | None = None
        self._executed = True
        """Whether the last step computed anything."""

    async def start(self, sink: Sink) -> Pages:
        self._loop = asyncio.get_running_loop()
        self._sink = sink
        started: asyncio.Future[Pages] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, args=(started,), name="engine-core", daemon=True)
        self._thread.start()
        return await started

    def add(self, request: EngineCoreRequest) -> None:
        self._inbox.put(("add", request))

    def abort(self, core_ids: list[str]) -> None:
        self._inbox.put(("abort", core_ids))

    async def close(self) -> None:
        self._inbox.put(("stop", None))
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, _JOIN_S)
            if self._thread.is_alive():
                logger.warning("the engine core's thread still runs %s s after it was told to stop", _JOIN_S)

    # -- in the thread ------------------------------------------------------------------------------------------

    def _run(self, started: asyncio.Future[Pages]) -> None:
        assert self._loop is not None
        try:
            core, pages = self._create()
        except Exception as error:
            logger.exception("the engine core cannot start")
            failure = EngineError(f"vLLM cannot start: {' '.join(str(error).split())}")
            self._call(_set_exception, started, failure)
            return
        self._call(_set_result, started, pages)
        try:
            while self._take_orders(core):
                self._step(core)
        except Exception as error:
            logger.exception("the engine core failed")
            self._emit(error)
        finally:
            self._shut_down(core)

    def _create(self) -> tuple[EngineCore, Pages]:
        import torch
        from vllm.v1.engine.core import EngineCore
        from vllm.v1.executor import Executor

        # The environment was read when torch was loaded, which may have been before it was set.
        torch.set_num_threads(self._threads)
        if os.environ.get("TORCH_COMPILE_DISABLE") == "1":
            torch._dynamo.config.disable = True
        core = EngineCore(self._config, Executor.get_class(self._config), log_stats=True)
        events = self._config.kv_events_config
        if events is not None and events.enable_kv_cache_events:
            core.scheduler.kv_event_publisher = _publisher(self._emit)
        ranks = core.collective_rpc("llmserve_pages")
        cache = self._config.cache_config
        return core, pages_of(cache.num_gpu_blocks or 0, cache.block_size, ranks)

    def _take_orders(self, core: EngineCore) -> bool:
        """Wait for orders as long as nothing can be computed; False to stop."""
        timeout_s: float | None = 0.0
        if not core.scheduler.has_requests() and not core.batch_queue:
            timeout_s = None
        elif not self._executed:
            idle = core.scheduler.get_num_unfinished_requests() == 0
            timeout_s = _HELD_POLL_S if idle else _BUSY_POLL_S
        while True:
            try:
                kind, value = self._inbox.get(block=timeout_s != 0.0, timeout=timeout_s)
            except queue.Empty:
                return True
            timeout_s = 0.0
            if kind == "stop":
                return False
            if kind == "abort":
                core.abort_requests(value)
            else:
                self._add(core, value)

    def _add(self, core: EngineCore, request: EngineCoreRequest) -> None:
        try:
            core.add_request(*core.preprocess_add_request(request))
        except Exception:
            logger.exception("the engine core refuses request %s", request.request_id)
            self._emit(refused(request.request_id))

    def _step(self, core: EngineCore) -> None:
        outputs, self._executed = core.step_fn()
        core.post_step(self._executed)
        for output in (outputs or {}).values():
            self._emit(output)

    def _emit(self, output: EngineCoreOutputs | KVEventBatch | Exception) -> None:
        self._call(self._sink, output)

    def _call(self, function: Any, *args: object) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            logger.debug("the event loop is closed, nobody hears the engine core")

    @staticmethod
    def _shut_down(core: EngineCore) -> None:
        try:
            core.shutdown()
        except Exception:
            logger.exception("the engine core did not shut down cleanly")


def _publisher(emit: Callable[[KVEventBatch], None]) -> EventPublisher:
    """Hands the scheduler's KV events on, in the order of its steps."""
    from vllm.distributed.kv_events import EventPublisher

    class Publisher(EventPublisher):  # type: ignore[misc]
        def publish(self, events: KVEventBatch) -> None:
            emit(events)

        def shutdown(self) -> None:
            """Nothing was opened."""

    return Publisher()


def _set_result(future: asyncio.Future[Pages], value: Pages) -> None:
    if not future.done():
        future.set_result(value)


def _set_exception(future: asyncio.Future[Pages], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
