"""The OpenAI API over the bus: what a client gets when a worker yields known tokens."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import msgspec
import pytest

from llmserve.bus.messages import Reason
from tests.gateway.conftest import World

CHAT = {"model": "smol", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0}
TEXT = "The quick brown fox jumps over the lazy dog."


def events(body: str) -> list[dict[str, Any]]:
    lines = [line[6:] for line in body.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def streamed_text(body: str) -> str:
    return "".join(c["delta"].get("content") or "" for e in events(body) for c in e.get("choices", []))


async def test_a_chat_completion_has_the_workers_text_and_the_right_usage(world: World) -> None:
    world.yields(TEXT)
    response = await world.client.post("/v1/chat/completions", json={**CHAT, "max_tokens": 100})
    body = response.json()
    assert response.status_code == 200, body
    assert body["choices"][0]["message"]["content"] == TEXT
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == len(world.encode(TEXT))
    assert body["usage"]["prompt_tokens"] == world.bus.accepted[0].request.prompt_tokens
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 3


async def test_max_tokens_ends_a_chat_with_length(world: World) -> None:
    world.yields(TEXT)
    body = (await world.client.post("/v1/chat/completions", json={**CHAT, "max_tokens": 2})).json()
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 2


async def test_a_stream_carries_the_same_text_and_usage(world: World) -> None:
    world.yields(TEXT)
    request = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    response = await world.client.post("/v1/chat/completions", json=request)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert streamed_text(response.text) == TEXT
    assert events(response.text)[-1]["usage"]["completion_tokens"] == len(world.encode(TEXT))


async def test_a_completion_for_two_prompts_has_two_choices(world: World) -> None:
    world.yields(TEXT)
    request = {"model": "smol", "prompt": ["One", "Two"], "max_tokens": 50}
    body = (await world.client.post("/v1/completions", json=request)).json()
    assert [choice["text"] for choice in body["choices"]] == [TEXT, TEXT]


async def test_responses_answer_with_the_text(world: World) -> None:
    world.yields(TEXT)
    body = (await world.client.post("/v1/responses", json={"model": "smol", "input": "Hello"})).json()
    assert body["status"] == "completed"
    assert body["output"][-1]["content"][0]["text"] == TEXT


async def test_streamed_responses_end_completed(world: World) -> None:
    world.yields(TEXT)
    response = await world.client.post("/v1/responses", json={"model": "smol", "input": "Hello", "stream": True})
    assert "event: response.completed" in response.text
    assert TEXT in response.text


async def test_messages_answer_with_the_text(world: World) -> None:
    world.yields(TEXT)
    request = {"model": "smol", "max_tokens": 50, "messages": CHAT["messages"]}
    body = (await world.client.post("/v1/messages", json=request)).json()
    assert body["content"][0]["text"] == TEXT


async def test_n_makes_as_many_requests_on_the_bus_and_choices(world: World) -> None:
    world.yields(TEXT)
    request = {**CHAT, "n": 2, "temperature": 1.0}
    body = (await world.client.post("/v1/chat/completions", json=request)).json()
    assert [choice["message"]["content"] for choice in body["choices"]] == [TEXT, TEXT]
    assert len({stored.request.request_id for stored in world.bus.accepted}) == 2


async def test_a_stop_string_ends_the_text_and_cancels_the_request(world: World) -> None:
    world.yields(TEXT, stop_after=8)
    body = (await world.client.post("/v1/chat/completions", json={**CHAT, "stop": [" fox"]})).json()
    assert body["choices"][0]["message"]["content"] == "The quick brown"
    await asyncio.sleep(0.05)
    assert world.bus.cancelled() == [world.bus.accepted[0].request.request_id]
    assert world.bus.stored == {}


async def test_logprobs_come_from_the_engines_own_output(world: World) -> None:
    import numpy as np
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.outputs import LogprobsLists
    from vllm.v1.serial_utils import MsgpackEncoder

    from llmserve.bus.frames import pack

    ids = world.encode(TEXT)[:3]

    def yield_logprobs(stored: Any) -> None:
        lists = LogprobsLists(
            np.array([[i, 5] for i in ids], dtype=np.int32),
            np.array([[-0.5, -2.0]] * 3, dtype=np.float32),
            np.array([1] * 3, dtype=np.int32),
        )
        encoder = MsgpackEncoder(size_threshold=8)
        extra = pack(encoder.encode(EngineCoreOutput("x", ids, new_logprobs=lists)))
        # Known tokens are repeated, and with them their logprobs.
        first = EngineCoreOutput("x", ids[:1], new_logprobs=lists.slice_request(0, 1))
        loop = asyncio.get_running_loop()
        loop.call_soon(lambda: world.bus.send(stored.request, ids[:1], extra=pack(encoder.encode(first))))
        loop.call_soon(lambda: world.bus.send(stored.request, ids, reason=Reason.STOP, extra=extra))

    world.bus.on_accept = yield_logprobs
    request = {**CHAT, "logprobs": True, "top_logprobs": 1}
    body = (await world.client.post("/v1/chat/completions", json=request)).json()
    content = body["choices"][0]["logprobs"]["content"]
    assert [entry["logprob"] for entry in content] == pytest.approx([-0.5] * 3)
    assert "".join(entry["token"] for entry in content).startswith("The quick")


async def test_a_tool_call_is_parsed(world: World) -> None:
    world.yields('<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>')
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
    body = (await world.client.post("/v1/chat/completions", json={**CHAT, "tools": tools})).json()
    call = body["choices"][0]["message"]["tool_calls"][0]["function"]
    assert (call["name"], json.loads(call["arguments"])) == ("add", {"a": 1})


@pytest.mark.parametrize("stream", [False, True])
async def test_a_lost_attempt_is_resumed_and_the_text_is_the_same(world: World, stream: bool) -> None:
    script = world.yields(TEXT, stop_after=4)
    before = world.metric("llmserve_attempts_repeated_total", mode="resume")
    asking = asyncio.create_task(world.client.post("/v1/chat/completions", json={**CHAT, "stream": stream}))
    await until(lambda: len(world.bus.accepted) == 1 and all(task.done() for task in script.tasks))
    script.stop_after = None
    world.bus.lose(world.bus.accepted[0])
    response = await asking
    text = streamed_text(response.text) if stream else response.json()["choices"][0]["message"]["content"]
    assert text == TEXT
    first, second = (stored.request for stored in world.bus.accepted)
    assert (second.request_id, second.attempt, second.offset) == (first.request_id, 1, 4)
    assert second.prompt_tokens == first.prompt_tokens + 4
    assert second.max_tokens == first.max_tokens - 4
    assert body_prompt(second.body) == body_prompt(first.body) + script.tokens[:4]
    assert world.metric("llmserve_attempts_repeated_total", mode="resume") == before + 1


async def test_a_greedy_request_with_penalties_is_replayed_from_its_start(world: World) -> None:
    script = world.yields(TEXT, stop_after=4)
    asking = asyncio.create_task(world.client.post("/v1/chat/completions", json={**CHAT, "presence_penalty": 1}))
    await until(lambda: len(world.bus.accepted) == 1 and all(task.done() for task in script.tasks))
    script.stop_after = None
    world.bus.lose(world.bus.accepted[0])
    assert (await asking).json()["choices"][0]["message"]["content"] == TEXT
    second = world.bus.accepted[1].request
    assert (second.offset, second.whole_output) == (0, True)


async def test_repeated_and_stale_deltas_change_nothing(world: World) -> None:
    ids = world.encode(TEXT)

    def stutter(stored: Any) -> None:
        def run() -> None:
            send, request = world.bus.send, stored.request
            send(request, ids[:3])
            send(request, ids[:3])
            send(msgspec.structs.replace(request, attempt=7), [1, 2, 3], 3)
            send(request, ids[1:], 1, Reason.STOP)
            send(request, ids, 0, Reason.STOP)

        asyncio.get_running_loop().call_soon(run)

    world.bus.on_accept = stutter
    body = (await world.client.post("/v1/chat/completions", json=CHAT)).json()
    assert body["choices"][0]["message"]["content"] == TEXT


async def test_a_request_whose_last_tokens_never_came_is_resumed(world: World) -> None:
    channel = world.gateway.channel
    channel._watch._probe_after_s, patience_s = 0.2, channel._watch._probe_after_s
    try:
        script = world.yields(TEXT, stop_after=4)
        asking = asyncio.create_task(world.client.post("/v1/chat/completions", json=CHAT))
        await until(lambda: len(world.bus.accepted) == 1 and all(task.done() for task in script.tasks))
        script.stop_after = None
        await world.bus.discard(world.bus.accepted[0].seq)
        assert (await asking).json()["choices"][0]["message"]["content"] == TEXT
    finally:
        channel._watch._probe_after_s = patience_s


async def test_tokenize_and_detokenize_are_inverse(world: World) -> None:
    tokens = (await world.client.post("/tokenize", json={"model": "smol", "prompt": TEXT})).json()["tokens"]
    body = (await world.client.post("/detokenize", json={"model": "smol", "tokens": tokens})).json()
    assert body["prompt"] == TEXT


async def test_models_are_listed_and_shown(world: World) -> None:
    listed = (await world.client.get("/v1/models")).json()["data"]
    assert [card["id"] for card in listed] == ["smol"]
    assert (await world.client.get("/v1/models/smol")).json() | {"created": 0, "permission": 0} == listed[0] | {
        "created": 0,
        "permission": 0,
    }


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)
    # The last tokens pass through the event loop before anyone acts on what follows.
    await asyncio.sleep(0.05)


def body_prompt(body: bytes) -> list[int]:
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.serial_utils import MsgpackDecoder

    prompt: list[int] = MsgpackDecoder(EngineCoreRequest).decode(body).prompt_token_ids
    return prompt
