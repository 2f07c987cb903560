"""The fast lane sends, byte for byte, what vLLM's own generators of streams would have sent."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from llmserve.bus.base import StoredRequest
from llmserve.bus.messages import Reason, Rejected
from llmserve.gateway.chunks import encode_json
from llmserve.gateway.fast_lane import ChatLane, CompletionLane
from tests.gateway.conftest import World

CHAT: dict[str, Any] = {"model": "smol", "messages": [{"role": "user", "content": "Hello"}]}
COMPLETION: dict[str, Any] = {"model": "smol", "prompt": "Hello"}
ROUTES = {"/v1/chat/completions": CHAT, "/v1/completions": COMPLETION}
TEXT = 'A "quoted" \\ line\n\ttab, naïve café, 日本語, 👩‍👩‍👧 and \x1b[0m </s> end.'
USAGE = {"stream_options": {"include_usage": True}}


class Steps:
    """A worker whose engine yields ``deltas``, each of some tokens, slowly enough that none are merged on the way."""

    def __init__(self, world: World, deltas: Sequence[Sequence[int]], reason: Reason, **last: Any) -> None:
        self._bus = world.bus
        self._deltas = deltas
        self._reason = reason
        self._last = last
        self.tasks: list[asyncio.Task[None]] = []
        world.bus.on_accept = self

    def __call__(self, stored: StoredRequest) -> None:
        self.tasks.append(asyncio.get_running_loop().create_task(self._run(stored)))

    async def _run(self, stored: StoredRequest) -> None:
        offset = 0
        for index, tokens in enumerate(self._deltas):
            for _ in range(30):
                await asyncio.sleep(0)
            last = index == len(self._deltas) - 1
            extra: dict[str, Any] = {"cached_tokens": 2} if index == 0 else {}
            if last:
                extra |= self._last
            self._bus.send(stored.request, tokens, offset, self._reason if last else None, **extra)
            offset += len(tokens)
        await self._bus.discard(stored.seq)


@pytest.fixture
def fixed_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1_700_000_000.0)


@pytest.fixture(params=["tool parser", "no parser"])
def parser(request: pytest.FixtureRequest, world: World, monkeypatch: pytest.MonkeyPatch) -> str:
    """vLLM drops tokens without text only if a parser stands in their way."""
    if request.param == "no parser":
        monkeypatch.setattr(world.state.openai_serving_chat, "parser_cls", None)
    return str(request.param)


async def stream(world: World, url: str, body: dict[str, Any]) -> bytes:
    headers = {"x-request-id": "fixed"}
    response = await world.client.post(url, json={**body, "stream": True}, headers=headers)
    assert response.status_code == 200, response.text
    return response.content


async def both(world: World, url: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> tuple[bytes, bytes]:
    """(the fast lane's bytes, vLLM's)."""
    fast = await stream(world, url, body)
    chat, completion = world.state.openai_serving_chat, world.state.openai_serving_completion
    with monkeypatch.context() as slow:
        slow.setattr(chat, "chat_completion_stream_generator", chat.chat_completion_stream_generator._slow)
        slow.setattr(completion, "completion_stream_generator", completion.completion_stream_generator._slow)
        return fast, await stream(world, url, body)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lanes that took a stream off vLLM's hands."""
    from llmserve.gateway import fast_lane, generation

    names: list[str] = []

    class Noted(generation.FastStream):
        def __init__(self, *arguments: Any) -> None:
            names.append("fast")
            super().__init__(*arguments)

    monkeypatch.setattr(fast_lane, "FastStream", Noted)
    return names


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "usage": USAGE,
    "stop string in the text": {"stop": ["café", "nowhere"]},
    "stop string that is kept": {"stop": ["café"], "include_stop_str_in_output": True, **USAGE},
    "stop string over several tokens": {"stop": ["naïve café, 日"], **USAGE},
    "stop string not found": {"stop": ["nowhere to be found"], **USAGE},
    "special tokens shown": {"skip_special_tokens": False},
    "special tokens not spaced": {"skip_special_tokens": False, "spaces_between_special_tokens": False},
    "stop token kept": {"include_stop_str_in_output": True, "skip_special_tokens": False},
    "service tier": {"service_tier": "flex", **USAGE},
    "service tier without usage": {"service_tier": "auto"},
    "seed and penalties": {"seed": 3, "presence_penalty": 0.5, "temperature": 0},
}


@pytest.mark.parametrize("url", ROUTES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("fixed_time", "parser")
async def test_the_bytes_are_vllms(
    world: World, url: str, case: str, monkeypatch: pytest.MonkeyPatch, taken: list[str]
) -> None:
    tokens = world.encode(TEXT)
    Steps(world, [[token] for token in tokens], Reason.STOP)
    fast, slow = await both(world, url, {**ROUTES[url], **CASES[case]}, monkeypatch)
    assert fast == slow
    assert fast.endswith(b"data: [DONE]\n\n")
    assert taken == ["fast"]
    assert world.gateway.engine.output_processor.request_states == {}


@pytest.mark.parametrize("url", ROUTES)
@pytest.mark.usefixtures("fixed_time")
async def test_an_answer_cut_off_at_max_tokens_or_at_a_stop_token_says_so(
    world: World, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = world.encode(TEXT)[:7]
    Steps(world, [tokens[:1], tokens[1:4], tokens[4:]], Reason.LENGTH)
    fast, slow = await both(world, url, {**ROUTES[url], **USAGE}, monkeypatch)
    assert fast == slow
    assert b'"finish_reason":"length"' in fast
    Steps(world, [tokens[:1], tokens[1:]], Reason.STOP, stop_reason=tokens[-1])
    fast, slow = await both(world, url, {**ROUTES[url], "stop_token_ids": [tokens[-1]]}, monkeypatch)
    assert fast == slow
    assert b'"stop_reason":%d' % tokens[-1] in fast


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.usefixtures("fixed_time", "parser")
async def test_any_tokens_in_any_steps_give_the_same_bytes(
    world: World, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids of the whole vocabulary: halves of characters, bytes that are no text, special tokens."""
    chance = random.Random(seed)
    vocabulary = world.gateway.engine.model_config.get_vocab_size()
    deltas = [[chance.randrange(vocabulary) for _ in range(chance.choice([1, 1, 1, 2, 5]))] for _ in range(25)]
    Steps(world, deltas, chance.choice([Reason.LENGTH, Reason.STOP]))
    for url, body in ROUTES.items():
        options = {"skip_special_tokens": chance.random() < 0.5, "stop": chance.choice([None, ["e", "zz"], ["the"]])}
        fast, slow = await both(world, url, {**body, **options, **USAGE}, monkeypatch)
        assert fast == slow


@pytest.mark.parametrize("url", ROUTES)
@pytest.mark.usefixtures("fixed_time")
async def test_a_failure_ends_both_alike(world: World, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = world.encode(TEXT)[:3]

    def break_off(stored: StoredRequest) -> None:
        async def run() -> None:
            for offset, token in enumerate(tokens):
                for _ in range(30):
                    await asyncio.sleep(0)
                world.bus.send(stored.request, [token], offset)
            for _ in range(30):
                await asyncio.sleep(0)
            no = Rejected(request_id=stored.request.request_id, attempt=0, code="internal", message="broke")
            world.bus.publish(world.bus.subjects.gateway("gw"), no)

        running.append(asyncio.get_running_loop().create_task(run()))

    running: list[asyncio.Task[None]] = []
    world.bus.on_accept = break_off
    fast, slow = await both(world, url, ROUTES[url], monkeypatch)
    assert fast == slow
    assert b"broke" in fast


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
OTHERS: dict[str, dict[str, Any]] = {
    "tools": {"tools": TOOLS},
    "logprobs": {"logprobs": True},
    "two choices": {"n": 2, "temperature": 1},
    "echo": {"echo": True},
    "token ids": {"return_token_ids": True},
    "usage all along": {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    "every fourth token": {"stream_interval": 4},
}


@pytest.mark.parametrize("case", OTHERS)
def test_everything_else_stays_on_vllms_path(world: World, case: str) -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    lane = world.state.openai_serving_chat.chat_completion_stream_generator
    assert isinstance(lane, ChatLane)
    assert isinstance(world.state.openai_serving_completion.completion_stream_generator, CompletionLane)
    assert lane._is_plain(ChatCompletionRequest(**CHAT, stream=True))
    assert not lane._is_plain(ChatCompletionRequest(**CHAT, stream=True, **OTHERS[case]))


def test_json_strings_are_written_as_pydantic_writes_them() -> None:
    from pydantic_core import to_json

    for code in [*range(0x300), 0x2028, 0x2029, 0xFEFF, 0xFFFD, 0x1F600, 0x10FFFF]:
        assert encode_json(chr(code)) == to_json(chr(code)), hex(code)


async def test_tokens_that_came_together_are_one_event(world: World) -> None:
    """As with vLLM, whose collector merges what its reader has not taken."""
    tokens = world.encode("one two three four")

    def at_once(stored: StoredRequest) -> None:
        def run() -> None:
            for offset, token in enumerate(tokens):
                last = offset == len(tokens) - 1
                world.bus.send(stored.request, [token], offset, Reason.STOP if last else None)

        asyncio.get_running_loop().call_later(0.05, run)

    world.bus.on_accept = at_once
    body = await stream(world, "/v1/completions", COMPLETION)
    events = [line for line in body.split(b"\n\n") if line.startswith(b"data: {")]
    assert [msgspec.json.decode(event[6:])["choices"][0]["text"] for event in events] == ["one two three four"]
