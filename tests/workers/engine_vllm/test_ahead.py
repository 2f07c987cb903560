"""Pages that move while their prompt is still being computed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from llmserve.bus.messages import Reason, Role, Stage
from tests.workers.engine_vllm.driver import Driver, Pair, body, engine_processes

pytestmark = pytest.mark.vllm
Prompt = Callable[..., list[int]]

STEP, PAGE = 256, 32
TOKENS = 5 * STEP + 40


async def opened(role: Role) -> Driver:
    return await Driver.open(
        role, "process", block_tokens=PAGE, prefix_caching=True, step_tokens=STEP, lease_s=8.0, timeout_s=3.0
    )


@pytest.fixture(scope="module")
async def chunked() -> AsyncIterator[Pair]:
    prefill, decode = await asyncio.gather(opened(Role.PREFILL), opened(Role.DECODE))
    yield Pair(prefill, decode)
    await asyncio.gather(prefill.close(), decode.close())


async def prefilled(pair: Pair, data: bytes, work_id: str) -> int:
    """Run a prefill, and let the decode engine fetch what is on offer as it comes; how often that was."""
    pair.prefill.offers.clear()
    pair.decode.moved.clear()
    pair.prefill.submit(Stage.PREFILL, data, work_id)
    given = 0
    outputs = pair.prefill.outputs(work_id)
    while not outputs:
        await pair.prefill.until(lambda: outputs or pair.prefill.offers, "pages are on offer")
        for offer in pair.prefill.offers:
            pair.decode.submit(Stage.DECODE, data, work_id, handoff=offer.handoff, ahead=True)
            given += 1
        pair.prefill.offers.clear()
    return given


async def test_only_the_last_chunk_is_left_to_move_and_the_output_is_that_of_one_engine(
    chunked: Pair, prompt: Prompt
) -> None:
    data = body(prompt(TOKENS, "A long prompt."))
    assert await prefilled(chunked, data, "long.0") == TOKENS // STEP
    first = await chunked.prefill.ended("long.0")
    early = len(chunked.decode.moved)
    rest = await chunked.decode.run(
        Stage.DECODE, data, "long.0", first_tokens=tuple(first.tokens), handoff=first.last.handoff
    )
    assert rest.last.reason is Reason.LENGTH
    assert rest.first.computed_tokens == 0
    moved = [moved.bytes_moved // chunked.decode.info.page_bytes for moved in chunked.decode.moved]
    assert early
    assert moved[-1] < -(-TOKENS // PAGE) / 2
    reference = (await chunked.prefill.run(Stage.WHOLE, data)).tokens
    assert first.tokens + rest.tokens == reference
    await chunked.prefill.all_free()
    await chunked.decode.all_free()


async def test_a_prefill_that_is_cancelled_half_way_leaves_nothing_behind(chunked: Pair, prompt: Prompt) -> None:
    data = body(prompt(TOKENS, "Another one."))
    chunked.prefill.offers.clear()
    chunked.prefill.submit(Stage.PREFILL, data, "half.0")
    await chunked.prefill.until(lambda: chunked.prefill.offers, "pages are on offer")
    chunked.prefill.engine.abort(["half.0"])
    await chunked.prefill.all_free()
    chunked.decode.moved.clear()
    chunked.decode.submit(Stage.DECODE, data, "half.0", handoff=chunked.prefill.offers[0].handoff, ahead=True)
    await chunked.decode.until(lambda: chunked.decode.moved, "the read ends")
    assert chunked.decode.moved[0].failure == "stale"
    await chunked.decode.all_free()
    # Nothing of it was kept: the prompt is computed as if it had never been on offer.
    assert (await chunked.decode.run(Stage.WHOLE, data)).first.computed_tokens == TOKENS


@pytest.mark.faults
async def test_a_prefill_engine_that_is_killed_while_its_pages_move_spoils_no_prompt(
    chunked: Pair, pair: Pair, prompt: Prompt
) -> None:
    for number in range(2):
        data = body(prompt(TOKENS, f"Number {number} dies."))
        before = engine_processes()
        prefill = await opened(Role.PREFILL)
        (process,) = engine_processes() - before
        prefill.submit(Stage.PREFILL, data, f"dies{number}.0")
        await prefill.until(lambda prefill=prefill, number=number: len(prefill.offers) > number, "pages are on offer")
        chunked.decode.moved.clear()
        chunked.decode.submit(
            Stage.DECODE, data, f"dies{number}.0", handoff=prefill.offers[number].handoff, ahead=True
        )
        process.kill()
        await chunked.decode.until(lambda: chunked.decode.moved, "the read ends")
        assert chunked.decode.moved[0].failure in ("", "peer", "timeout")
        await chunked.decode.all_free()
        whole = await chunked.decode.run(Stage.WHOLE, data)
        assert whole.tokens == await pair.whole(data)
        await prefill.close()
