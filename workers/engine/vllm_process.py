"""The engine core in a child process, through vLLM's own ``AsyncMPClient``: for GPUs, and several engines in one
process."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
from typing import TYPE_CHECKING

from llmserve.workers.engine.base import EngineError
from llmserve.workers.engine.vllm_core import Core, Pages, Unheard, pages_of, refused
from llmserve.workers.engine.vllm_fork import fork_engines
from llmserve.workers.engine.vllm_subscription import KvSubscription

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    from vllm.config import VllmConfig
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.core_client import AsyncMPClient

    from llmserve.workers.engine.vllm_core import Sink

logger = logging.getLogger(__name__)

_STOP_S = 5.0
"""Seconds that the child gets to stop by itself."""
_LISTEN_AGAIN_S = 1.0
_CHILD = "EngineCore"


class ProcessCore(Core):
    """An engine core in a child that dies with this process.

    ``fork``: the child comes from the fork server, which has vLLM loaded.
    """

    def __init__(self, config: VllmConfig, fork: bool) -> None:
        self._config = config
        self._fork = fork
        self._client: AsyncMPClient | None = None
        self._starting: asyncio.Future[AsyncMPClient] | None = None
        self._before: set[int] = set()
        self._orders: asyncio.Queue[tuple[EngineCoreRequest | None, list[str]]] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._events: KvSubscription | None = None

    async def start(self, sink: Sink) -> Pages:
        self._before = {child.pid for child in _children() if child.pid is not None}
        loop = asyncio.get_running_loop()
        events = self._config.kv_events_config
        if events is not None and events.enable_kv_cache_events:
            self._events = KvSubscription(events)
        self._starting = loop.run_in_executor(None, self._open)
        try:
            client = await asyncio.shield(self._starting)
        except Exception as error:
            raise EngineError(f"vLLM cannot start: {' '.join(str(error).split())}") from error
        self._client = client
        # Reads of the outputs start with the first call of any kind.
        ranks = await client.collective_rpc_async("llmserve_pages")
        cache = self._config.cache_config
        self._tasks = [
            asyncio.create_task(self._read(sink), name="engine-core-outputs"),
            asyncio.create_task(self._send(sink), name="engine-core-orders"),
        ]
        if self._events is not None:
            await self._events.connected()
            self._tasks.append(asyncio.create_task(self._hear(self._events, sink), name="engine-core-kv-events"))
        said = [(str(fingerprint), int(size), str(engines)) for fingerprint, size, engines in ranks]
        return pages_of(cache.num_gpu_blocks or 0, cache.block_size, said)

    async def _hear(self, events: KvSubscription, sink: Sink) -> None:
        while True:
            try:
                async for batch in events.batches():
                    sink(batch)
            except Exception:
                # The engine works all the same; only where its pages are is not known as well.
                logger.exception("the engine core's KV events could not be taken in; listening again")
                sink(Unheard())
            await asyncio.sleep(_LISTEN_AGAIN_S)

    def _open(self) -> AsyncMPClient:
        from vllm.v1.engine.core_client import AsyncMPClient
        from vllm.v1.executor import Executor

        from llmserve.workers.engine.vllm_executor import guarded

        if self._fork:
            fork_engines()
        return AsyncMPClient(self._config, guarded(Executor.get_class(self._config)), log_stats=True)

    def add(self, request: EngineCoreRequest) -> None:
        self._orders.put_nowait((request, []))

    def abort(self, core_ids: list[str]) -> None:
        self._orders.put_nowait((None, core_ids))

    async def _send(self, sink: Sink) -> None:
        assert self._client is not None
        while True:
            request, aborted = await self._orders.get()
            try:
                if request is None:
                    await self._client.abort_requests_async(aborted)
                else:
                    await self._client.add_request_async(request)
            except Exception as error:
                # A dead core is reported by the reader; this one is then only out of order.
                logger.error("the engine core cannot be told of %s: %r", request or aborted, error)
                if request is not None:
                    sink(refused(request.request_id))

    async def _read(self, sink: Sink) -> None:
        assert self._client is not None
        try:
            while True:
                sink(await self._client.get_output_async())
        except Exception as error:
            sink(error)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._events is not None:
            self._events.close()
        if self._starting is not None and not self._starting.done():
            # The client's constructor ends in an error as soon as its child is gone.
            await asyncio.to_thread(self._kill_new_children)
            await asyncio.wait([self._starting], timeout=_STOP_S)
        if self._starting is not None and self._starting.done() and not self._starting.cancelled():
            error = self._starting.exception()
            self._client = None if error else self._starting.result()
        if self._client is not None:
            try:
                await asyncio.to_thread(self._client.shutdown, _STOP_S)
            except Exception:
                logger.exception("the engine core's process did not stop cleanly")
            self._client = None

    def _kill_new_children(self) -> None:
        # vLLM names its children only by kind: of engines that start at the same time all are ended.
        for child in _children():
            if child.pid not in self._before:
                child.kill()


def _children() -> list[BaseProcess]:
    return [child for child in multiprocessing.active_children() if child.name.startswith(_CHILD)]
