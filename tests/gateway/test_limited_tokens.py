"""Limits of tokens and context, which only the tokenized request can be held to."""

from __future__ import annotations

from tests.gateway.conftest import KEYS, World
from tests.gateway.test_api import CHAT, TEXT

SMALL = {"authorization": f"Bearer {KEYS['small']}"}


async def test_output_ends_at_the_tenants_context_and_unused_tokens_go_back(world: World) -> None:
    world.yields(TEXT)
    response = await world.client.post("/v1/chat/completions", json=CHAT, headers=SMALL)
    body = response.json()
    assert response.status_code == 200, body
    request = world.bus.accepted[0].request
    assert request.prompt_tokens + request.max_tokens == 100
    again = await world.client.post("/v1/chat/completions", json={**CHAT, "max_tokens": 1}, headers=SMALL)
    used = body["usage"]["total_tokens"]
    # What the first one used is gone, and what the second one has reserved when its response begins.
    remaining = int(again.headers["x-ratelimit-remaining-tokens"])
    assert 0 <= 1000 - used - (request.prompt_tokens + 1) - remaining <= 1


async def test_a_prompt_beyond_the_tenants_context_is_a_bad_request(world: World) -> None:
    body = {"model": "smol", "prompt": "word " * 120, "max_tokens": 1}
    response = await world.client.post("/v1/completions", json=body, headers=SMALL)
    assert response.status_code == 400
    assert "context length of tenant small is 100 tokens" in response.json()["error"]["message"]


async def test_tokens_beyond_the_minutes_are_429_and_leave_nothing_behind(world: World) -> None:
    world.yields(TEXT, stop_after=1)
    body = {"model": "smol", "prompt": ["word " * 50] * 20, "max_tokens": 40}
    response = await world.client.post("/v1/completions", json=body, headers=SMALL)
    assert response.status_code == 429
    assert "tokens per minute" in response.json()["error"]["message"]
    assert int(response.headers["retry-after"]) >= 1
