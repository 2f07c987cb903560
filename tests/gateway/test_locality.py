"""What a stored request says about its blocks, for each attempt, and what the client is told of reuse."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import pytest

from llmserve.bus.block_hashes import short_hashes
from llmserve.bus.cache_salt import CacheSalts
from llmserve.bus.messages import Deltas, Heartbeat, Request, Role
from llmserve.gateway.block_size import BlockSize
from llmserve.workers.engine.wire import decode_body
from tests.bus.samples import until
from tests.gateway.conftest import KEYS, World

pytestmark = pytest.mark.vllm

PROMPT = list(range(1000, 1056))
BODY = {"model": "smol", "prompt": PROMPT, "max_tokens": 20, "temperature": 0}


def beat(member: str, page_tokens: int, role: Role = Role.PREFILL, *, leaving: bool = False) -> Heartbeat:
    return Heartbeat(member=member, role=role, host="h", pid=1, page_tokens=page_tokens, leaving=leaving)


@pytest.fixture
def paged(world: World) -> Iterator[World]:
    """A world with one prefill worker of 16-token pages."""
    world.bus.publish(world.bus.subjects.heartbeats, beat("p", 16))
    yield world
    world.bus.publish(world.bus.subjects.heartbeats, beat("p", 16, leaving=True))


def names_what_workers_will(request: Request, tenant: str) -> bool:
    """Whether the request names the blocks of its body as a worker will hash them."""
    body = decode_body(request.body)
    salt = CacheSalts("test", {}).worker_salt(tenant, body.cache_salt)
    return request.block_hashes == short_hashes(body.prompt, request.block_tokens, salt)


async def test_a_request_names_its_blocks_as_its_worker_will(paged: World) -> None:
    paged.yields("Fine.")
    await paged.client.post("/v1/completions", json=BODY)
    request = paged.bus.accepted[0].request
    assert (request.block_tokens, len(request.block_hashes)) == (16, 3 * 8)
    assert names_what_workers_will(request, "acme")


async def test_a_resubmission_names_the_blocks_of_prompt_and_delivered_tokens(paged: World) -> None:
    text = "One two three four five six seven eight nine ten."
    paged.yields(text, stop_after=9)
    answer = asyncio.ensure_future(paged.client.post("/v1/completions", json=BODY))
    await until(lambda: sum(len(d.items) for _, d in paged.bus.published if isinstance(d, Deltas)) == 9)
    paged.yields(text)
    paged.bus.lose(paged.bus.accepted[0])
    assert (await answer).status_code == 200
    again = paged.bus.accepted[1].request
    assert (again.offset, len(again.block_hashes)) == (9, 4 * 8)
    assert names_what_workers_will(again, "acme")


async def test_tenants_and_salts_of_their_own_never_name_the_same_blocks(paged: World) -> None:
    paged.yields("Fine.")
    for key in ("acme", "zeta"):
        for salt in ({}, {"cache_salt": "mine"}):
            headers = {"authorization": f"Bearer {KEYS[key]}"}
            await paged.client.post("/v1/completions", json={**BODY, **salt}, headers=headers)
    named = {stored.request.block_hashes for stored in paged.bus.accepted}
    assert len(named) == 4
    first_blocks = {hashes[:8] for hashes in named}
    assert len(first_blocks) == 4


async def test_without_paged_workers_no_blocks_are_named(world: World) -> None:
    world.yields("Fine.")
    await world.client.post("/v1/completions", json=BODY)
    request = world.bus.accepted[0].request
    assert (request.block_tokens, request.block_hashes) == (0, b"")


async def test_prompts_that_are_computed_whole_name_no_blocks(paged: World) -> None:
    paged.yields("Fine.")
    await paged.client.post("/v1/completions", json={**BODY, "prompt_logprobs": 1})
    assert paged.bus.accepted[0].request.block_hashes == b""


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
async def test_the_usage_of_a_stream_tells_what_was_reused_as_that_of_a_whole_answer_does(
    world: World, path: str
) -> None:
    world.yields("Fine.")
    body = BODY if path == "completions" else {"model": "smol", "messages": [{"role": "user", "content": "Hi"}]}
    whole = (await world.client.post(f"/v1/{path}", json=body)).json()["usage"]
    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    text = (await world.client.post(f"/v1/{path}", json=streamed)).text
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    usage = next(event["usage"] for event in reversed(events) if event.get("usage"))
    assert whole["prompt_tokens_details"]["cached_tokens"] == 3
    assert usage["prompt_tokens_details"]["cached_tokens"] == 3


def test_the_block_size_is_that_of_most_workers_that_live() -> None:
    now = [0.0]
    size = BlockSize(lambda: now[0])
    assert size.tokens == 0
    for name, tokens in (("a", 16), ("b", 32), ("c", 32)):
        size.hear(beat(name, tokens))
    size.hear(beat("d", 64, Role.DECODE))
    assert size.tokens == 32
    size.hear(beat("c", 32, leaving=True))
    size.hear(beat("b", 16))
    assert size.tokens == 16
    now[0] = 10.0
    assert size.tokens == 0
