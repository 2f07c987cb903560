"""The whole path computes what the model computes without vLLM, and moves each page once."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from tests.made_up import made_up_answer
from tests.processes import Stack, metrics, total

pytestmark = pytest.mark.vllm

PAGE_TOKENS = 128
TOKENS = 24
LENGTHS = [20, 127, 128, 129, 256, 257, 700, 1024, 1500]


def prompt(length: int) -> list[int]:
    return [1000 + (length * 7919 + k * 31) % 40000 for k in range(length)]


async def ask(stack: Stack, tokens: list[int], max_tokens: int = TOKENS) -> list[int]:
    body = {
        "model": stack.model,
        "prompt": tokens,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    async with httpx.AsyncClient(timeout=300) as client:
        answer = await client.post(f"{stack.url}/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    ids: list[int] = answer.json()["choices"][0]["token_ids"]
    return ids


@pytest.mark.parametrize("length", LENGTHS)
async def test_greedy_output_is_the_models(exact: Stack, length: int) -> None:
    assert await ask(exact, prompt(length)) == made_up_answer(prompt(length), TOKENS)


async def test_eight_at_once_do_not_mix(exact: Stack) -> None:
    lengths = [20, 127, 128, 129, 300, 512, 900, 1500]
    ours = await asyncio.gather(*(ask(exact, prompt(n)) for n in lengths))
    assert ours == [made_up_answer(prompt(n), TOKENS) for n in lengths]


async def test_the_decode_worker_prefills_nothing_and_the_bytes_moved_are_the_pages(exact: Stack) -> None:
    before = metrics(exact.metrics_url)
    for length in (100, 128, 129, 1500):
        await ask(exact, [7, *prompt(length)[1:]], 4)
    after = metrics(exact.metrics_url)

    def grown(name: str, **labels: str) -> float:
        return total(after, name, **labels) - total(before, name, **labels)

    pages = sum(-(-length // PAGE_TOKENS) for length in (100, 128, 129, 1500))
    page_bytes = total(after, "llmserve_kv_page_bytes", role="decode")
    assert page_bytes > 0
    assert grown("llmserve_transfer_bytes_total") == pages * page_bytes
    assert grown("llmserve_prefill_tokens_total", role="decode") == 0
    assert grown("llmserve_prefill_tokens_total", role="prefill") == 100 + 128 + 129 + 1500
