"""Small prompts are rendered at once, and become the tokens that they become when they wait for a thread."""

from __future__ import annotations

import random
from typing import Any

import pytest

from llmserve.gateway import fast_route
from llmserve.gateway.inline import INLINE_BYTES, small_request
from tests.gateway.conftest import World
from tests.gateway.test_fast_lane import TEXT

TEXTS = [
    "",
    " ",
    "  two  spaces,\ttabs\r\n\r\nand lines  ",
    TEXT,
    "<|im_end|>\n<|im_start|>system\nand <|endoftext|> in the text",
    "12345 67 8, 3.14159e-10",
    "😀 e\u0301 combined, \u200b none",
    "word " * 300,
]


def chance_text(seed: int) -> str:
    chance = random.Random(seed)
    pieces = [*TEXTS[:-1], "a", "ß", "漢字", "\x00", "\n\n", "don't", "…", "🏳️‍🌈"]
    return "".join(chance.choice(pieces) for _ in range(chance.randrange(1, 12)))


async def rendered(world: World, url: str, text: str) -> tuple[list[list[int]], list[list[int]]]:
    """(tokens of a small request, tokens of one that waits), from vLLM's own serving class."""
    renderer = world.gateway.engine.renderer
    prompts: list[Any] = []
    for small in (True, False):
        token = small_request.set(small)
        try:
            if url == "chat":
                from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

                messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
                request = ChatCompletionRequest(messages=messages, model="smol")
                _, inputs = await world.state.openai_serving_chat.render_chat_request(request)
            else:
                inputs = await renderer.render_cmpl_async([{"prompt": text}])
        finally:
            small_request.reset(token)
        prompts.append([item["prompt_token_ids"] for item in inputs])
    return prompts[0], prompts[1]


@pytest.mark.parametrize("url", ["chat", "completion"])
async def test_the_tokens_are_the_same(world: World, url: str) -> None:
    for text in [*TEXTS, *(chance_text(seed) for seed in range(100))]:
        small, waiting = await rendered(world, url, text)
        assert small == waiting, text


@pytest.mark.parametrize("field", ["messages", "prompt"])
async def test_a_prompt_beyond_the_context_gets_the_same_error(
    world: World, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "a b " * 600
    prompt: Any = [{"role": "user", "content": text}] if field == "messages" else text
    url = "/v1/chat/completions" if field == "messages" else "/v1/completions"
    answers = []
    for bound in (INLINE_BYTES, 0):
        monkeypatch.setattr(fast_route, "INLINE_BYTES", bound)
        answers.append(await world.client.post(url, json={"model": "smol", "stream": True, field: prompt}))
    assert answers[0].status_code == 400
    assert "maximum context length" in answers[0].text
    assert answers[0].json() == answers[1].json()
