"""What a router says after another took over from it is not believed by gateways."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from llmserve.bus.memory import MemoryBroker
from llmserve.bus.messages import AnyMessage, AttemptLost, Rejected
from tests.gateway.test_api import until
from tests.sim_gateway import SimGateway


class Routers:
    """Two of them, and the gateway to which they speak."""

    def __init__(self) -> None:
        self.broker = MemoryBroker()
        self.gateway = SimGateway(self.broker.bus("gateway"))
        self.bus = self.broker.bus("routers")

    async def say(self, message: AnyMessage) -> None:
        self.bus.publish(self.bus.subjects.gateway(self.gateway.member), message)
        await asyncio.sleep(0.01)

    def attempts(self) -> list[int]:
        return [stored.request.attempt for stored in self.broker.requests.values()]


def lost(request_id: str, attempt: int, epoch: int) -> AttemptLost:
    return AttemptLost(request_id=request_id, attempt=attempt, seq=1, cause="gone", epoch=epoch)


def rejected(request_id: str, attempt: int, epoch: int) -> Rejected:
    return Rejected(request_id=request_id, attempt=attempt, code="unavailable", message="nobody", epoch=epoch)


@pytest.mark.parametrize("old", [lost, rejected])
async def test_a_deposed_routers_word_changes_nothing(
    old: Callable[[str, int, int], AnyMessage],
) -> None:
    routers = Routers()
    gateway = routers.gateway
    await gateway.open()
    answer = await gateway.send([1, 2, 3], 10)
    (stored,) = routers.broker.requests.values()
    request_id = stored.request.request_id
    await routers.say(lost(request_id, 0, epoch=2))
    await until(lambda: routers.attempts() == [1])
    await routers.say(old(request_id, 1, 1))
    assert routers.attempts() == [1]
    assert not answer.done.is_set()
    await routers.say(rejected(request_id, 1, epoch=2))
    await until(answer.done.is_set)
    assert answer.code == "unavailable"
    await gateway.close()
