"""A draft model on both sides of a handoff; here the model itself, so that nearly every draft is accepted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from llmserve.bus.messages import Role, Stage
from tests.workers.engine_vllm.driver import Driver, Pair, assert_same_up_to_a_tie, body

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
async def drafting() -> AsyncIterator[Pair]:
    engines = [Driver.open(role, "process", draft=True) for role in (Role.PREFILL, Role.DECODE)]
    prefill, decode = await asyncio.gather(*engines)
    yield Pair(prefill, decode)
    await asyncio.gather(prefill.close(), decode.close())


async def test_drafts_are_accepted_after_a_handoff_as_on_one_engine(
    drafting: Pair, pair: Pair, prompt: Callable[..., list[int]]
) -> None:
    data = body(prompt(400), max_tokens=25)
    first = await drafting.prefill.run(Stage.PREFILL, data)
    rest = await drafting.decoded(data, first)  # before the reference, which leaves its pages behind
    reference = await drafting.decode.run(Stage.WHOLE, data)
    assert first.tokens + rest.tokens == reference.tokens
    assert rest.first.computed_tokens == 0
    assert len(rest.outputs) <= 12
    # An engine without a draft; verifying several tokens at once changes bf16 arithmetic a little.
    plain = await pair.decode.run(Stage.WHOLE, body(prompt(400), max_tokens=25, logprobs=5))
    assert_same_up_to_a_tie(first.tokens + rest.tokens, plain)
    await drafting.prefill.all_free()
    await drafting.decode.all_free()
