"""Pages handed from one real vLLM engine to another."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from llmserve.bus.messages import Reason, Stage
from llmserve.workers.engine.base import EngineError
from llmserve.workers.engine.vllm_outputs import decode_extra
from tests.workers.engine_vllm.driver import Pair, body

pytestmark = pytest.mark.vllm
Prompt = Callable[..., list[int]]

LENGTHS = [20, 127, 128, 129, 257, 511, 1025]


async def test_both_engines_make_pages_of_the_same_kind(pair: Pair) -> None:
    assert pair.prefill.info.fingerprint == pair.decode.info.fingerprint != ""
    assert pair.prefill.info.page_bytes == pair.decode.info.page_bytes


@pytest.mark.parametrize("tokens", LENGTHS)
async def test_greedy_output_is_that_of_one_engine_and_nothing_is_computed_twice(
    pair: Pair, prompt: Prompt, tokens: int
) -> None:
    data = body(prompt(tokens))
    reference = await pair.whole(data)
    pair.decode.moved.clear()
    first = await pair.prefill.run(Stage.PREFILL, data)
    rest = await pair.decoded(data, first)
    assert first.tokens + rest.tokens == reference
    assert rest.last.reason is Reason.LENGTH
    assert (first.first.computed_tokens, rest.first.computed_tokens) == (tokens, 0)
    assert first.last.pages == -(-tokens // pair.prefill.info.page_tokens)
    assert [m.bytes_moved for m in pair.decode.moved] == [first.last.pages * pair.prefill.info.page_bytes]
    await pair.prefill.all_free()


async def test_eight_at_once_give_what_one_engine_gives(pair: Pair, prompt: Prompt) -> None:
    bodies = [body(prompt(60 + 50 * i, f"Chapter {i}.")) for i in range(8)]
    references = [await pair.whole(data) for data in bodies]
    outputs = await asyncio.gather(*(both(pair, data) for data in bodies))
    assert outputs == references
    await pair.prefill.all_free()
    await pair.decode.all_free()


async def both(pair: Pair, data: bytes) -> list[int]:
    first = await pair.prefill.run(Stage.PREFILL, data)
    rest = await pair.decoded(data, first)
    assert rest.first.computed_tokens == 0
    return first.tokens + rest.tokens


async def test_the_whole_output_comes_from_the_decode_engine_if_so_asked(pair: Pair, prompt: Prompt) -> None:
    data = body(prompt(300), repetition_penalty=1.3)
    reference = await pair.whole(data)
    first = await pair.prefill.run(Stage.PREFILL, data, whole_output=True)
    rest = await pair.decoded(data, first, whole_output=True)
    assert first.tokens == []
    assert rest.tokens == reference
    assert rest.first.computed_tokens == 1


async def test_a_prefill_that_meets_its_stop_token_ends_the_request_and_holds_nothing(
    pair: Pair, prompt: Prompt
) -> None:
    (token,) = (await pair.prefill.run(Stage.PREFILL, body(prompt(60), max_tokens=1))).tokens
    ended = await pair.prefill.run(Stage.PREFILL, body(prompt(60), stop_token_ids=[token]))
    assert (ended.last.reason, ended.last.stop_reason, ended.last.handoff) == (Reason.STOP, token, b"")
    await pair.prefill.all_free()


async def test_a_prefill_of_the_only_token_ends_the_request(pair: Pair, prompt: Prompt) -> None:
    ended = await pair.prefill.run(Stage.PREFILL, body(prompt(60), max_tokens=1))
    assert (ended.last.reason, ended.last.handoff, len(ended.tokens)) == (Reason.LENGTH, b"", 1)
    await pair.prefill.all_free()


async def test_logprobs_of_both_engines_come_in_extra(pair: Pair, prompt: Prompt) -> None:
    data = body(prompt(40), max_tokens=4, logprobs=2, prompt_logprobs=1)
    first = await pair.prefill.run(Stage.PREFILL, data)
    rest = await pair.decoded(data, first)
    said = decode_extra(first.first.extra)
    assert said.request_id == first.first.work_id
    assert said.finish_reason is None
    assert said.new_prompt_logprobs_tensors is not None
    assert len(said.new_prompt_logprobs_tensors.logprobs) == 39
    for output in [*first.outputs, *rest.outputs]:
        said = decode_extra(output.extra)
        assert said.new_token_ids == output.tokens
        assert said.new_logprobs is not None
        assert len(said.new_logprobs.logprobs) == len(output.tokens)
    assert all(decode_extra(output.extra).new_prompt_logprobs_tensors is None for output in rest.outputs)


async def test_without_logprobs_there_is_no_extra(pair: Pair, prompt: Prompt) -> None:
    assert all(not output.extra for output in (await pair.decode.run(Stage.WHOLE, body(prompt(40)))).outputs)


async def test_cancelled_between_prefill_and_decode_the_pages_are_free_again(pair: Pair, prompt: Prompt) -> None:
    first = await pair.prefill.run(Stage.PREFILL, body(prompt(400)))
    work_id = first.last.work_id
    assert pair.prefill.engine.load().pages_free < pair.prefill.info.pages_total
    pair.prefill.engine.abort([work_id])
    await pair.prefill.until(lambda: work_id in pair.prefill.released, "the release is reported")
    await pair.prefill.all_free()
    assert [output.reason for output in pair.prefill.outputs(work_id)] == [None]


async def test_cancelled_in_the_middle_of_the_decode_the_pages_are_free_again(pair: Pair, prompt: Prompt) -> None:
    work_id = pair.decode.submit(Stage.WHOLE, body(prompt(300), max_tokens=1500))
    await pair.decode.until(lambda: len(pair.decode.outputs(work_id)) > 3, "it runs")
    pair.decode.engine.abort([work_id])
    ended = await pair.decode.ended(work_id)
    assert ended.last.reason is Reason.CANCELLED
    await pair.decode.all_free()


async def test_cancelled_in_the_middle_of_the_prefill_the_pages_are_free_again(pair: Pair, prompt: Prompt) -> None:
    work_ids = [pair.prefill.submit(Stage.PREFILL, body(prompt(1500))) for _ in range(2)]
    await asyncio.sleep(0.05)
    pair.prefill.engine.abort(work_ids)
    for work_id in work_ids:
        assert (await pair.prefill.ended(work_id)).last.reason is Reason.CANCELLED
    await pair.prefill.all_free()


async def test_an_aborted_id_can_be_used_again_and_unknown_ones_are_ignored(pair: Pair, prompt: Prompt) -> None:
    pair.decode.submit(Stage.WHOLE, body(prompt(50), max_tokens=500), "again.0")
    with pytest.raises(EngineError, match=r"again\.0 is here already"):
        pair.decode.submit(Stage.WHOLE, body(prompt(50)), "again.0")
    pair.decode.engine.abort(["again.0", "unknown.0"])
    await pair.decode.ended("again.0")
    pair.decode.submit(Stage.WHOLE, body(prompt(50), max_tokens=3), "again.0")
    await pair.decode.until(lambda: pair.decode.outputs("again.0")[-1].reason is Reason.LENGTH, "it runs again")


async def test_a_lease_that_nobody_reads_frees_its_pages(pair: Pair, prompt: Prompt) -> None:
    first = await pair.prefill.run(Stage.PREFILL, body(prompt(400)))
    await pair.prefill.until(lambda: first.last.work_id in pair.prefill.released, "the lease ends")
    await pair.prefill.all_free()


async def test_pages_read_after_their_lease_are_noticed_and_computed_again(pair: Pair, prompt: Prompt) -> None:
    data = body(prompt(500))
    reference = await pair.whole(data)
    first = await pair.prefill.run(Stage.PREFILL, data)
    await pair.prefill.until(lambda: first.last.work_id in pair.prefill.released, "the lease ends")
    others = [body(prompt(1500, f"Other {i}."), max_tokens=1) for i in range(pair.prefill.info.pages_total // 12 + 1)]
    await asyncio.gather(*(pair.prefill.run(Stage.PREFILL, other) for other in others))
    pair.decode.moved.clear()
    rest = await pair.decoded(data, first)
    assert [m.failure for m in pair.decode.moved] == ["stale"]
    assert first.tokens + rest.tokens == reference
    assert rest.first.computed_tokens == 500


async def test_a_handoff_of_another_kind_of_engine_is_computed_again(pair: Pair, prompt: Prompt) -> None:
    import msgspec

    from llmserve.workers.connector.wire import decode_handoff, encode

    data = body(prompt(200))
    reference = await pair.whole(data)
    first = await pair.prefill.run(Stage.PREFILL, data)
    pair.decode.moved.clear()
    other = encode(msgspec.structs.replace(decode_handoff(first.last.handoff), fingerprint="other"))
    rest = await pair.decode.run(Stage.DECODE, data, first_tokens=tuple(first.tokens), handoff=other)
    assert first.tokens + rest.tokens == reference
    assert [m.failure for m in pair.decode.moved] == ["fingerprint"]
    pair.prefill.engine.abort([first.last.work_id])
    await pair.prefill.all_free()
