"""Pages that are loaded in the step that computes with them, between real engines."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator

import pytest

from llmserve.bus.messages import Stage
from llmserve.workers.connector.wire import Handoff, decode_handoff
from tests.workers.engine_vllm.driver import Driver, Pair, body

pytestmark = pytest.mark.vllm
Prompt = Callable[..., list[int]]


@pytest.fixture
async def near(pair: Pair, prompt: Prompt) -> Pair:
    """The decode engine has met the prefill engine."""
    data = body(prompt(40))
    await pair.decoded(data, await pair.prefill.run(Stage.PREFILL, data))
    pair.decode.moved.clear()
    return pair


async def test_pages_of_a_producer_once_met_come_in_the_step_of_the_first_token(near: Pair, prompt: Prompt) -> None:
    data = body(prompt(130))
    reference = await near.whole(data)
    first = await near.prefill.run(Stage.PREFILL, data)
    rest = await near.decoded(data, first)
    assert first.tokens + rest.tokens == reference
    assert [(m.engine, m.direction) for m in near.decode.moved] == [("same_host", "load")]
    assert rest.first.computed_tokens == 0
    await near.prefill.all_free()


@contextlib.contextmanager
def flickering(handoff: Handoff) -> Iterator[None]:
    """The lease is over, and is not, and is over again: as nobody would do it, but at every moment of a load."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    # The prefill engine's, which runs in a thread of this process.
    table = get_kv_transfer_group().worker_side._leases.table
    ended = threading.Event()

    def flicker() -> None:
        while not ended.wait(0.002):
            table.clear(handoff.slot)
            ended.wait(0.002)
            table.arm(handoff.slot, handoff.token)

    thread = threading.Thread(target=flicker)
    thread.start()
    yield
    ended.set()
    thread.join()
    table.clear(handoff.slot)


async def test_no_token_leaves_the_engine_that_was_computed_with_pages_whose_lease_ended_meanwhile(
    near: Pair, prompt: Prompt, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(40):
        data = body(prompt(300, f"Story {number}."), max_tokens=3)
        reference = await near.whole(data)
        first = await near.prefill.run(Stage.PREFILL, data)
        with flickering(decode_handoff(first.last.handoff)):
            rest = await near.decoded(data, first)
        near.prefill.engine.abort([first.last.work_id])
        assert first.tokens + rest.tokens == reference
        if "computed again" in caplog.text:
            break
        # A load that was good, or a read as ever: after one that failed the producer has to be met again.
        again = body(prompt(40))
        await near.decoded(again, await near.prefill.run(Stage.PREFILL, again))
    assert "computed again: the pages of its handoff were not valid" in caplog.text
    assert rest.first.computed_tokens == 300
    await free(near.prefill, near.decode)


async def free(*drivers: Driver) -> None:
    await asyncio.gather(*(driver.all_free() for driver in drivers))
