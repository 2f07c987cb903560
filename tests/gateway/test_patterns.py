"""A chat that differs from an earlier one in its messages only becomes what vLLM would have made of it."""

from __future__ import annotations

import asyncio
import json
import random
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from llmserve.bus.base import StoredRequest
from llmserve.bus.messages import Rejected
from llmserve.gateway import patterns
from llmserve.gateway.engine_client import BusEngineClient
from llmserve.gateway.middleware import GatewayMiddleware, RequestBounds
from llmserve.gateway.patterns import plain_chat
from tests.gateway.conftest import KEYS, World
from tests.gateway.test_adjust import sampling_params
from tests.gateway.test_fast_route import ask
from tests.gateway.test_inline import TEXTS, chance_text

CHAT = "/v1/chat/completions"
HELLO = {"role": "user", "content": "Hello"}
JSON = {"content-type": "application/json"}
OPTIONS: dict[str, list[Any]] = {
    "max_tokens": [1, 7, 400, None],
    "max_completion_tokens": [5],
    "min_tokens": [1],
    "temperature": [0, 0.7],
    "top_p": [0.1],
    "top_k": [5],
    "min_p": [0.1],
    "stop": ["x", ["x", "yz"], None],
    "stop_token_ids": [[7, 8]],
    "presence_penalty": [0.5],
    "repetition_penalty": [1.1],
    "seed": [3],
    "logit_bias": [{"7": 1.5}],
    "ignore_eos": [True],
    "skip_special_tokens": [False],
    "stream_options": [{"include_usage": True}, {"include_usage": False}],
    "cache_salt": ["grain"],
    "user": ["someone"],
    "n": [1],
}
"""From which a pattern can be made."""
SECOND: dict[str, Any] = {"role": "assistant", "content": "Well."}
OTHERS: list[dict[str, Any]] = [
    {"temperature": 9},
    {"service_tier": "flex"},
    {"add_generation_prompt": False, "continue_final_message": True},
    {"chat_template_kwargs": {"add_generation_prompt": False}},
    {"response_format": {"type": "json_object"}},
    {"request_id": "mine"},
    {"logprobs": True},
    {"echo": True},
    {"bad_words": ["the"]},
    {"truncate_prompt_tokens": 5},
    {"tool_choice": "none", "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]},
    {"messages": [{"role": "user", "content": "Hello", "name": "n"}]},
    {"messages": [{"role": "developer", "content": "Hello"}]},
    {"messages": [{"role": "assistant", "content": None}]},
    {"messages": [{"role": "system", "content": "x-anthropic-billing-header: 7\nHello"}]},
    {"messages": []},
]
"""Of which vLLM makes more than of the messages alone, or nothing."""


def body(messages: list[dict[str, Any]], **options: Any) -> bytes:
    return json.dumps({"model": "smol", "messages": messages, "stream": True, **options}).encode()


def chance_messages(chance: random.Random) -> list[dict[str, str]]:
    roles = chance.choice([["user"], ["system", "user"], ["user", "assistant", "user"], ["assistant"]])
    return [
        {"role": role, "content": chance.choice([*TEXTS, chance_text(chance.randrange(99))])[:300]} for role in roles
    ]


@pytest.fixture
async def vllm(world: World, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[httpx.AsyncClient]:
    """The same gateway without the short way, at the same time of the day and with the same luck."""
    monkeypatch.setattr(time, "time", lambda: 1_700_000_000.0)
    monkeypatch.setattr(secrets, "randbits", lambda bits: 7)
    gateway = world.gateway
    assert gateway._vllm is not None
    bounds = RequestBounds(64 << 10, 1 << 20)
    app = GatewayMiddleware(gateway._vllm.app, gateway._access, gateway._readiness, gateway._metrics, bounds)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    headers = {"authorization": f"Bearer {KEYS['acme']}"}
    async with httpx.AsyncClient(transport=transport, base_url="http://gw", headers=headers, timeout=30) as client:
        yield client


@pytest.fixture
def alike(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the requests that were made from a pattern."""
    made: list[str] = []
    real = BusEngineClient.add_stream

    async def noted(self: BusEngineClient, request: Any, stream: Any) -> None:
        made.append(request.request_id)
        await real(self, request, stream)

    monkeypatch.setattr(BusEngineClient, "add_stream", noted)
    return made


async def learned(world: World, alike: list[str], **options: Any) -> None:
    """Two chats that make the pattern of those that follow."""
    for text in ("One.", "And two."):
        await world.client.post(CHAT, content=body([{"role": "user", "content": text}], **options), headers=JSON)
    assert alike == []


@pytest.mark.parametrize("seed", range(10))
async def test_the_engine_and_the_client_get_what_vllm_makes(
    world: World, vllm: httpx.AsyncClient, alike: list[str], seed: int
) -> None:
    world.yields("Well.")
    chance = random.Random(seed)
    options = {name: chance.choice(OPTIONS[name]) for name in chance.sample(list(OPTIONS), chance.randrange(6))}
    options["user"] = f"of seed {seed}"  # else an earlier test may have made the pattern
    await learned(world, alike, **options)
    for _ in range(8):
        content = body(chance_messages(chance), **options)
        assert await ask(world, world.client, CHAT, content) == await ask(world, vllm, CHAT, content), content
    assert len(alike) > 4
    assert world.gateway.engine.output_processor.request_states == {}


@pytest.mark.parametrize("others", OTHERS, ids=str)
async def test_whatever_else_a_body_says_is_vllms(
    world: World, vllm: httpx.AsyncClient, alike: list[str], others: dict[str, Any]
) -> None:
    world.yields("Well.")
    content = body(**{"messages": [{"role": "user", "content": "Hello"}, SECOND], "max_tokens": 3, **others})
    for _ in range(3):
        assert await ask(world, world.client, CHAT, content) == await ask(world, vllm, CHAT, content)
    assert alike == []


@pytest.mark.parametrize("max_tokens", [None, 3])
async def test_a_prompt_beyond_the_context_is_refused_as_vllm_does(
    world: World, vllm: httpx.AsyncClient, alike: list[str], max_tokens: int | None
) -> None:
    world.yields("Well.")
    await learned(world, alike, max_tokens=max_tokens, user="long")
    for words in (470, 480, 481, 482, 483, 490, 900):
        content = body(
            [{"role": "user", "content": "a b " * (words // 2) + "a " * (words % 2)}],
            max_tokens=max_tokens,
            user="long",
        )
        assert await ask(world, world.client, CHAT, content) == await ask(world, vllm, CHAT, content), words
    assert alike


async def test_random_sampling_that_has_state_gets_a_seed_of_its_own_each_time(
    world: World, alike: list[str]
) -> None:
    world.yields("Well.")
    options = {"temperature": 1, "presence_penalty": 0.5, "user": "seeds"}
    await learned(world, alike, **options)
    seeds = []
    for _ in range(2):
        await world.client.post(CHAT, content=body([HELLO], **options), headers=JSON)
        seeds.append(sampling_params(world).seed)
    assert len(alike) == len({*seeds, None}) - 1 == 2


async def test_one_tenants_limit_is_not_in_the_pattern_of_another(world: World, alike: list[str]) -> None:
    world.yields("Well.")
    for key in ("small", "small", "acme", "small"):
        headers = {**JSON, "authorization": f"Bearer {KEYS[key]}"}
        content = body([HELLO], max_tokens=90, user="limits")
        assert (await world.client.post(CHAT, content=content, headers=headers)).status_code == 200
    bounds = [item.request.max_tokens for item in world.bus.accepted]
    assert bounds[0] < 90
    assert bounds == [bounds[0], bounds[0], 90, bounds[0]]
    assert len(alike) == 2


async def test_a_client_that_goes_and_a_worker_that_fails_leave_nothing(world: World, alike: list[str]) -> None:
    world.yields("Well.")
    await learned(world, alike, user="ends")
    world.yields("One two three four.", stop_after=2)
    content = body([HELLO], user="ends")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await world.client.post(CHAT, content=content, headers=JSON)

    def refuse(stored: StoredRequest) -> None:
        no = Rejected(request_id=stored.request.request_id, attempt=0, code="internal", message="broke")
        asyncio.get_running_loop().call_soon(world.bus.publish, world.bus.subjects.gateway("gw"), no)

    world.bus.on_accept = refuse
    assert b"broke" in (await world.client.post(CHAT, content=content, headers=JSON)).content
    assert len(alike) == 2
    client = world.gateway._client
    assert (client._streams, client._callers, len(client.channel)) == ({}, {}, 0)


async def test_options_that_come_again_outlast_those_that_come_once(
    world: World, alike: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "_KEPT", 4)
    world.yields("Well.")
    await learned(world, alike, user="stays")
    for number in range(12):
        await world.client.post(CHAT, content=body([HELLO], user=f"once {number}"), headers=JSON)
        if number % 3 == 2:
            await world.client.post(CHAT, content=body([HELLO], user="stays"), headers=JSON)
    assert len(alike) == 4
    for user in ("a", "b", "c", "d", "stays"):
        await world.client.post(CHAT, content=body([HELLO], user=user), headers=JSON)
    assert len(alike) == 4


@pytest.mark.parametrize(
    "wrong",
    [
        b'{"messages": [{"role": "user", "content": "\xff"}]}',
        b'{"user": "\xff", "messages": []}',
        b"[]",
        b"{}",
        b"\xff",
    ],
)
def test_what_is_not_json_to_all_is_left_to_vllm(wrong: bytes) -> None:
    assert plain_chat(wrong) is None
