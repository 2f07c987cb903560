"""The short way past FastAPI hands the engine what vLLM's own route hands it, or answers with the same error."""

from __future__ import annotations

import json
import random
import secrets
import time
from typing import Any

import httpx
import pytest
from msgspec.structs import replace

from llmserve.bus.messages import Request
from llmserve.gateway.middleware import GatewayMiddleware, RequestBounds
from tests.gateway.conftest import KEYS, World
from tests.gateway.test_fast_lane import ROUTES
from tests.malformed import OWN, malformed

RIGHT: dict[str, list[Any]] = {
    "temperature": [0, 0.7, 1, "0.5"],
    "top_p": [0.1, 1],
    "top_k": [0, 5],
    "min_p": [0.1],
    "max_tokens": [1, 7, None],
    "min_tokens": [0, 1],
    "seed": [3],
    "stop": ["x", ["x", "yz"], None],
    "stop_token_ids": [[7, 8]],
    "presence_penalty": [0.5],
    "frequency_penalty": [-0.5],
    "repetition_penalty": [1.1],
    "logit_bias": [{"7": 1.5}],
    "ignore_eos": [True],
    "skip_special_tokens": [False],
    "include_stop_str_in_output": [True],
    "stream_options": [{"include_usage": True}],
    "user": ["someone"],
    "cache_salt": ["grain"],
    "service_tier": ["flex", "auto"],
    "structured_outputs": [{"regex": "a+"}],
    "response_format": [{"type": "json_object"}],
    "priority": [0],
    "no_field_of_anyones": [1],
}


def body(chance: random.Random, url: str) -> bytes:
    """Mostly right, with some field or the whole of it wrong now and then."""
    fields = {name: chance.choice(RIGHT[name]) for name in chance.sample(list(RIGHT), chance.randrange(6))}
    if chance.random() < 0.3:
        wrong = chance.choice(list(OWN[url]))
        fields[wrong] = chance.choice(OWN[url][wrong])
    whole = json.dumps({**ROUTES[url], "stream": True, **fields})
    # Written so, it is not seen as a stream at once.
    return (whole.replace("stream", "stre\\u0061m") if chance.random() < 0.1 else whole).encode()


def nameless(request: Request) -> Request:
    body = request.body.replace(request.request_id.encode(), b"name")
    return replace(request, request_id="name", created_s=0.0, body=body)


async def ask(world: World, client: httpx.AsyncClient, url: str, content: bytes) -> tuple[object, ...]:
    """What the client gets and what the bus, without the names that differ from one time to the next."""
    world.bus.accepted.clear()
    headers = {"content-type": "application/json", "x-request-id": "fixed"}
    answer = await client.post(url, content=content, headers=headers)
    stored = [(item.tenant, item.klass, nameless(item.request)) for item in world.bus.accepted]
    if answer.status_code == 200 and not answer.content.startswith(b'data: {"error"'):
        return 200, answer.content, stored
    # What vLLM finds only when it streams is an event on its way, and a status of its own on ours.
    said = answer.content.removeprefix(b"data: ").partition(b"\n\n")[0]
    return "refused", json.loads(said)["error"]["message"], stored


@pytest.mark.parametrize("seed", range(4))
async def test_both_ways_lead_to_the_same(world: World, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1_700_000_000.0)
    monkeypatch.setattr(secrets, "randbits", lambda bits: 7)
    world.yields("Well.")
    gateway = world.gateway
    assert gateway._vllm is not None
    slow = GatewayMiddleware(
        gateway._vllm.app, gateway._access, gateway._readiness, gateway._metrics, RequestBounds(64 << 10, 1 << 20)
    )
    chance = random.Random(seed)
    accepted = 0
    transport = httpx.ASGITransport(app=slow, raise_app_exceptions=False)
    headers = {"authorization": f"Bearer {KEYS['acme']}"}
    async with httpx.AsyncClient(transport=transport, base_url="http://gw", headers=headers, timeout=30) as client:
        for _ in range(60):
            asked = malformed(chance) if chance.random() < 0.2 else None
            url = chance.choice(list(ROUTES)) if asked is None else asked.url
            content = body(chance, url) if asked is None else asked.body
            fast = await ask(world, world.client, url, content)
            assert fast == await ask(world, client, url, content), content[:500]
            accepted += fast[0] == 200
    assert 15 < accepted < 60
