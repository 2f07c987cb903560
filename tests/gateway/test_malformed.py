"""Random bodies that no one should send: each is a 4xx in OpenAI's shape, and none reaches the bus."""

from __future__ import annotations

import os
import random

import pytest

from tests.gateway.conftest import World
from tests.gateway.test_api import TEXT
from tests.malformed import fault_of, malformed

COUNT = int(os.environ.get("LLMSERVE_MALFORMED_BODIES", "2000"))
ROUNDS = 8


@pytest.mark.parametrize("seed", range(ROUNDS))
async def test_every_malformed_body_is_a_4xx_and_leaves_nothing(world: World, seed: int) -> None:
    chance = random.Random(seed)
    # What got through in spite of all would be answered, and show up as 200.
    world.yields(TEXT)
    wrong: list[str] = []
    for _ in range(COUNT // ROUNDS):
        asked = malformed(chance)
        response = await world.client.post(
            asked.url, content=asked.body, headers={"content-type": "application/json"}
        )
        if fault := fault_of(asked, response.status_code, response.text):
            wrong.append(fault)
    assert wrong == [], "\n".join(wrong[:20])
    assert world.bus.accepted == []
    assert world.gateway.engine.output_processor.request_states == {}
    assert len(world.gateway.channel) == 0
