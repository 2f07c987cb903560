"""An accepted request whose worker died goes on, however full its tenant keeps the queue."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from llmserve.bus.base import QueueFull, StoredRequest
from llmserve.bus.memory import MemoryBroker
from llmserve.bus.messages import AttemptLost, Request
from llmserve.bus.settings import BusSettings
from llmserve.bus.subjects import again
from tests.gateway.test_api import until
from tests.sim_gateway import SimGateway

LIMIT = 3


class Flooded:
    """A stream in progress, and other clients of its tenant who take every place in the queue at once."""

    def __init__(self) -> None:
        self.broker = MemoryBroker("test", BusSettings(queue_max_len=LIMIT))
        self.gateway = SimGateway(self.broker.bus("gateway"))
        self.bus = self.broker.bus("others")
        self.made = 0

    async def begin(self) -> None:
        await self.gateway.open()
        await self.gateway.send([1, 2, 3], 10)
        (stored,) = self.broker.requests.values()
        self.request_id, self.tenant, self.klass = stored.request.request_id, stored.tenant, stored.klass
        self.fill(self.klass)

    def fill(self, klass: str) -> None:
        """Take every place that is free."""
        try:
            while True:
                self.made += 1
                other = Request(request_id=f"other{self.made}", gateway="g", attempt=0, created_s=0.0,
                                prompt_tokens=1, max_tokens=1, api="api", body=b"")  # fmt: skip
                self.broker.store(other, self.tenant, klass)
        except QueueFull:
            pass

    def worker_dies(self, attempt: int) -> None:
        lost = AttemptLost(request_id=self.request_id, attempt=attempt, seq=0, cause="killed")
        self.bus.publish(self.bus.subjects.gateway(self.gateway.member), lost)

    def attempts(self) -> list[int]:
        requests = [stored.request for stored in self.broker.requests.values()]
        return [request.attempt for request in requests if request.request_id == self.request_id]


class Contended(dict[int, StoredRequest]):
    """The requests on the stream; others hear of each place that comes free."""

    def __init__(self, flooded: Flooded, on_free: Callable[[], object]) -> None:
        super().__init__(flooded.broker.requests)
        self._on_free = on_free

    def pop(self, seq: int, default: object = None) -> Any:
        gone = super().pop(seq, default)
        self._on_free()
        return gone


async def test_a_stream_whose_worker_died_goes_on_though_others_take_each_place_in_its_tenants_queue() -> None:
    flooded = Flooded()
    await flooded.begin()
    flooded.broker.requests = Contended(flooded, lambda: flooded.fill(flooded.klass))
    flooded.worker_dies(attempt=0)
    await until(lambda: flooded.attempts() == [1])
    first = [stored for stored in flooded.broker.requests.values() if stored.request.attempt == 0]
    assert len(first) == LIMIT
    await flooded.gateway.close()


async def test_the_place_of_a_lost_attempt_is_its_next_ones_if_later_attempts_have_no_other() -> None:
    flooded = Flooded()
    await flooded.begin()
    flooded.worker_dies(attempt=0)
    await until(lambda: flooded.attempts() == [1])
    flooded.fill(again(flooded.klass))
    loop = asyncio.get_running_loop()
    flooded.broker.requests = Contended(
        flooded, lambda: loop.call_later(0.05, flooded.fill, again(flooded.klass))
    )  # fmt: skip
    flooded.worker_dies(attempt=1)
    await until(lambda: flooded.attempts() == [2])
    await flooded.gateway.close()
