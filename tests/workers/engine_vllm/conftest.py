"""One pair of engines for the session: prefill in a thread of this process, decode in a child."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from llmserve.bus.messages import Role
from tests.made_up import made_up_model
from tests.workers.engine_vllm.driver import Driver, Pair
from tests.workers.engine_vllm.kept import Kept, keeping

LEASE_S = 5.0
TEXT = (
    "The history of computing begins with mechanical calculators and continues with programmable machines. "
    "Ada Lovelace wrote what many call the first program, long before transistors existed. "
    "In 1947 the transistor was invented at Bell Labs, and integrated circuits followed a decade later. "
)


@pytest.fixture(scope="session")
async def pair() -> AsyncIterator[Pair]:
    prefill, decode = await asyncio.gather(
        Driver.open(Role.PREFILL, "thread", lease_s=LEASE_S, kv_space_gb=0.03),
        Driver.open(Role.DECODE, "process", timeout_s=3.0),
    )
    yield Pair(prefill, decode)
    await asyncio.gather(prefill.close(), decode.close())


@pytest.fixture(scope="session")
def prompt() -> Callable[[int, str], list[int]]:
    """A prompt of so many tokens of text that begins with a word of one's own."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made_up_model())

    def make(tokens: int, start: str = "Once upon a time.") -> list[int]:
        ids: list[int] = tokenizer.encode(f"{start} {TEXT * (tokens // 50 + 1)}")
        return ids[:tokens]

    return make


@pytest.fixture(scope="session")
async def kept(
    tmp_path_factory: pytest.TempPathFactory, prompt: Callable[[int, str], list[int]]
) -> AsyncIterator[Kept]:
    """An engine with a folder and a bucket, for all that can befall them."""
    async with keeping(tmp_path_factory.mktemp("kept"), prompt) as made:
        yield made
