"""Who takes a request off the stream whose worker died after its last token and before its record."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from llmserve.bus.flow.router import Router
from llmserve.bus.flow.settings import RouterSettings
from llmserve.bus.memory import MemoryBroker
from llmserve.bus.messages import AttemptLost, Delta, Deltas, Reason, Result
from llmserve.gateway import endings
from tests.sim_gateway import Answer, SimGateway
from tests.workers.world import until


class Death:
    """A worker that has sent all tokens of a request, and dies."""

    def __init__(self) -> None:
        self.broker = MemoryBroker()
        self.gateway = SimGateway(self.broker.bus("gateway"))
        self.bus = self.broker.bus("others")

    async def ended(self) -> Answer:
        """A request whose client has all of its output; it is still on the stream."""
        await self.gateway.open()
        answer = await self.gateway.send([1, 2, 3], 2)
        (stored,) = self.broker.requests.values()
        self.seq, self.request_id = stored.seq, stored.request.request_id
        delta = Delta(self.request_id, 0, 0, [7, 8], Reason.LENGTH, cached_tokens=2)
        self.bus.publish(self.bus.subjects.gateway(self.gateway.member), Deltas(worker="w", items=[delta]))
        await answer.done.wait()
        return answer

    def tell(self, request_id: str) -> None:
        lost = AttemptLost(request_id=request_id, attempt=0, seq=self.seq, cause="killed", epoch=1)
        self.bus.publish(self.bus.subjects.gateway(self.gateway.member), lost)


@pytest.fixture
async def death() -> Death:
    return Death()


async def test_its_gateway_records_what_it_has_delivered(death: Death) -> None:
    answer = await death.ended()
    for _ in range(3):
        death.tell(death.request_id)
    await until(lambda: not death.broker.requests)
    assert list(death.broker.results.values()) == [
        Result(
            request_id=death.request_id,
            attempt=0,
            worker=death.gateway.member,
            reason=Reason.LENGTH,
            prompt_tokens=3,
            output_tokens=2,
            cached_tokens=2,
        )
    ]
    assert answer.tokens == [7, 8]
    await death.gateway.close()


async def test_so_it_does_if_it_hears_only_then_that_the_request_is_stored(
    death: Death, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The acknowledgement was lost with the bus, which then tells where it stands."""
    accept, answered = death.gateway.channel._bus.accept, asyncio.Event()

    async def late(*request: Any) -> int:
        seq = await accept(*request)
        await answered.wait()
        return seq

    monkeypatch.setattr(death.gateway.channel._bus, "accept", late)
    await death.gateway.open()
    sending = asyncio.create_task(death.gateway.send([1, 2, 3], 2))
    await until(lambda: death.broker.requests)
    (stored,) = death.broker.requests.values()
    delta = Delta(stored.request.request_id, 0, 0, [7, 8], Reason.LENGTH)
    death.bus.publish(death.bus.subjects.gateway(death.gateway.member), Deltas(worker="w", items=[delta]))
    await asyncio.sleep(0.01)
    answered.set()
    await sending
    await until(lambda: not death.broker.requests)
    (result,) = death.broker.results.values()
    assert result.output_tokens == 2
    await death.gateway.close()


async def test_a_request_that_its_gateway_does_not_know_goes_without_a_record(
    death: Death, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endings, "KEEP_S", 0.0)
    await death.ended()
    await asyncio.sleep(0.01)
    death.tell("another")
    await until(lambda: not death.broker.requests)
    assert not death.broker.results
    await death.gateway.close()


async def test_what_ended_long_ago_is_forgotten(death: Death, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endings, "KEEP_S", 0.01)
    await death.ended()
    first = death.request_id
    await asyncio.sleep(0.02)
    second = await death.gateway.send([4], 1)
    request_id = max(death.broker.requests.values(), key=lambda stored: stored.seq).request.request_id
    delta = Delta(request_id, 0, 0, [9], Reason.LENGTH)
    death.bus.publish(death.bus.subjects.gateway(death.gateway.member), Deltas(worker="w", items=[delta]))
    await second.done.wait()
    death.tell(first)
    await until(lambda: death.seq not in death.broker.requests)
    assert not death.broker.results
    await death.gateway.close()


async def test_a_router_that_waited_for_another_attempt_is_at_rest_afterwards(death: Death) -> None:
    await death.ended()
    router = Router(death.broker.bus("router"), RouterSettings(lost_retry_s=0.05), "router")
    await router.start()
    running = asyncio.create_task(router.run())
    await until(lambda: router.core.ledger.entries)
    (entry,) = router.core.ledger.entries.values()
    death.tell(death.request_id)
    await until(lambda: entry.seq not in router.core.ledger.entries)
    assert not death.broker.requests
    await router.stop()
    await running
    await death.gateway.close()
