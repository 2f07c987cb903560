"""Engines of two ranks: each rank's pages go to the same rank on the other side."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from llmserve.bus.messages import Role, Stage
from llmserve.manifests.models import PACKAGED_ID
from llmserve.workers.engine import make_engine
from llmserve.workers.engine.base import EngineError
from tests.made_up import made_up_answer
from tests.workers.engine_vllm.driver import Driver, Pair, body, manifest

pytestmark = pytest.mark.vllm

LENGTHS = [20, 127, 128, 129, 300, 1000]
TOKENS = 16
GPUS = len(list(Path("/dev").glob("nvidia[0-9]*")))


@pytest.fixture(scope="module", params=["tensor_parallel", "pipeline_parallel"])
async def two_ranks(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    if request.param == "pipeline_parallel" and GPUS < 2:
        pytest.skip("pipelines need GPUs: two")
    engines = [Driver.open(role, "process", model={request.param: 2}) for role in (Role.PREFILL, Role.DECODE)]
    prefill, decode = await asyncio.gather(*engines)
    yield Pair(prefill, decode)
    await asyncio.gather(prefill.close(), decode.close())


async def test_engines_of_two_ranks_hand_over_and_compute_what_one_rank_does(two_ranks: Pair) -> None:
    rng = random.Random(1)
    for length in LENGTHS:
        prompt = [rng.randrange(4096) for _ in range(length)]
        data = body(prompt, max_tokens=TOKENS)
        two_ranks.decode.moved.clear()
        first = await two_ranks.prefill.run(Stage.PREFILL, data)
        rest = await two_ranks.decoded(data, first)
        # On GPUs fp32 is rounded otherwise than by the model without vLLM: there the decode engine is asked alone.
        whole = (await two_ranks.decode.run(Stage.WHOLE, data)).tokens if GPUS else made_up_answer(prompt, TOKENS)
        assert first.tokens + rest.tokens == whole, length
        assert rest.first.computed_tokens == 0
        page_bytes = two_ranks.prefill.info.page_bytes
        # Each of two ranks moved its half of every page.
        assert [m.bytes_moved for m in two_ranks.decode.moved] == [first.last.pages * page_bytes // 2] * 2
    await two_ranks.prefill.all_free()
    await two_ranks.decode.all_free()


def test_pipeline_parallelism_on_cpus_is_refused_in_one_line() -> None:
    with pytest.raises(EngineError, match=r"pipeline_parallel: 2 needs GPUs"):
        make_engine(manifest(model={"pipeline_parallel": 2}), Role.PREFILL)


async def test_heads_that_ranks_cannot_share_are_refused_in_one_line() -> None:
    with pytest.raises(EngineError) as refused:
        await Driver.open(Role.PREFILL, "process", model={"id": PACKAGED_ID, "tensor_parallel": 2})
    assert "attention heads (9) must be divisible by tensor parallel size (2)" in str(refused.value)
    assert len(str(refused.value)) < 200
