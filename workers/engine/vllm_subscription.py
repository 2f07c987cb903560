"""What an engine core in another process tells of its pages, over vLLM's own ZeroMQ publisher."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from llmserve.workers.engine.base import EngineError

if TYPE_CHECKING:
    from vllm.config.kv_events import KVEventsConfig
    from vllm.distributed.kv_events import KVEventBatch

logger = logging.getLogger(__name__)

_CONNECT_S = 10.0


class KvSubscription:
    """To be made before the engine core starts, and ``connected`` before its first request: nothing is said twice."""

    def __init__(self, config: KVEventsConfig) -> None:
        import zmq
        import zmq.asyncio

        self._endpoint: str = config.endpoint
        self._expected = 0
        self._socket = zmq.asyncio.Context.instance().socket(zmq.SUB)
        self._socket.setsockopt(zmq.RCVHWM, config.hwm)
        self._socket.subscribe(config.topic.encode())
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self._socket.connect(self._endpoint)

    async def connected(self, timeout_s: float = _CONNECT_S) -> None:
        """Wait until all that is published from now on arrives. Raises ``EngineError``."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._monitor.recv_multipart()
        except TimeoutError:
            raise EngineError(f"the engine core tells nothing of its pages at {self._endpoint}") from None
        self._socket.disable_monitor()

    async def batches(self) -> AsyncIterator[KVEventBatch]:
        """Without end, but for an exception; then to be asked for again."""
        import msgspec
        from vllm.distributed.kv_events import KVEventBatch

        decoder = msgspec.msgpack.Decoder(KVEventBatch)
        while True:
            _, number, payload = await self._socket.recv_multipart()
            seq = int.from_bytes(number, "big")
            if seq != self._expected:
                # Only when the queue of the socket was full. Some pages are then not known, or known and gone.
                logger.error("%d batches of the engine core's KV events were lost", seq - self._expected)
            self._expected = seq + 1
            yield decoder.decode(payload)

    def close(self) -> None:
        self._socket.disable_monitor()
        self._socket.close(linger=0)
