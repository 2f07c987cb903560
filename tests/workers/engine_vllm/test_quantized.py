"""KV pages in fp8 (``kv_cache.hbm_dtype``): half the bytes, and handed over as they are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from llmserve.bus.messages import Role, Stage
from llmserve.manifests.machine import probe_machine
from llmserve.manifests.models import PACKAGED_ID
from tests.workers.engine_vllm.driver import Driver, Pair, body

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not probe_machine().avx512, reason="vLLM's fp8 cache needs AVX-512 on CPUs"),
]


@pytest.fixture(scope="module")
async def fp8() -> AsyncIterator[Pair]:
    model = {"id": PACKAGED_ID, "dtype": "bf16"}
    engines = [Driver.open(role, "process", model=model, hbm_dtype="fp8") for role in (Role.PREFILL, Role.DECODE)]
    prefill, decode = await asyncio.gather(*engines)
    yield Pair(prefill, decode)
    await asyncio.gather(prefill.close(), decode.close())


async def test_a_value_takes_a_byte_and_pages_are_of_another_kind(fp8: Pair, pair: Pair) -> None:
    info = fp8.prefill.info
    assert info.page_bytes == info.page_tokens * 30 * 3 * 2 * 64, "tokens x layers x heads x (K, V) x values"
    assert fp8.prefill.info.fingerprint == fp8.decode.info.fingerprint != pair.decode.info.fingerprint


async def test_greedy_output_after_a_handoff_is_that_of_one_fp8_engine(
    fp8: Pair, prompt: Callable[..., list[int]]
) -> None:
    for tokens in (20, 128, 129, 700):
        data = body(prompt(tokens))
        reference = await fp8.whole(data)
        fp8.decode.moved.clear()
        first = await fp8.prefill.run(Stage.PREFILL, data)
        rest = await fp8.decoded(data, first)
        assert first.tokens + rest.tokens == reference
        assert rest.first.computed_tokens == 0
        assert [m.bytes_moved for m in fp8.decode.moved] == [first.last.pages * fp8.prefill.info.page_bytes]
    await fp8.prefill.all_free()
    await fp8.decode.all_free()
