"""Engines of two ranks: each rank's pages go to the same rank on the other side."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from llmserve.bus.messages import Role, Stage
from llmserve.manifests.models import resolve_model
from llmserve.workers.engine import make_engine
from llmserve.workers.engine.base import EngineError
from tests.workers.engine_vllm.driver import MODEL, Driver, Pair, body, manifest

pytestmark = pytest.mark.vllm

LENGTHS = [20, 127, 128, 129, 300, 1000]
TOKENS = 16


def make_model(folder: Path) -> None:
    """A Llama of random weights whose heads two ranks can share, in fp32; vLLM wants a tokenizer to be there."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(resolve_model(MODEL).path) / name, folder)


def reference(folder: Path, prompt: list[int]) -> list[int]:
    """Greedy output of the same weights, without vLLM."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder)
    made = model.generate(torch.tensor([prompt]), max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
    return [int(token) for token in made[0][len(prompt) :]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_model(path)
    return path


@pytest.fixture(scope="module")
async def two_ranks(folder: Path) -> AsyncIterator[Pair]:
    model = {"id": str(folder), "dtype": "fp32", "tensor_parallel": 2}
    engines = [Driver.open(role, "process", model=model) for role in (Role.PREFILL, Role.DECODE)]
    prefill, decode = await asyncio.gather(*engines)
    yield Pair(prefill, decode)
    await asyncio.gather(prefill.close(), decode.close())


async def test_tensor_parallel_engines_hand_over_and_compute_what_one_rank_does(
    two_ranks: Pair, folder: Path
) -> None:
    rng = random.Random(1)
    for length in LENGTHS:
        prompt = [rng.randrange(4096) for _ in range(length)]
        data = body(prompt, max_tokens=TOKENS)
        two_ranks.decode.moved.clear()
        first = await two_ranks.prefill.run(Stage.PREFILL, data)
        rest = await two_ranks.decoded(data, first)
        assert first.tokens + rest.tokens == reference(folder, prompt), length
        assert rest.first.computed_tokens == 0
        page_bytes = two_ranks.prefill.info.page_bytes
        # Each of two ranks moved its half of every page.
        assert [m.bytes_moved for m in two_ranks.decode.moved] == [first.last.pages * page_bytes // 2] * 2
    await two_ranks.prefill.all_free()
    await two_ranks.decode.all_free()


def test_pipeline_parallelism_on_cpus_is_refused_in_one_line(folder: Path) -> None:
    model = {"id": str(folder), "pipeline_parallel": 2}
    with pytest.raises(EngineError, match=r"pipeline_parallel: 2 needs GPUs"):
        make_engine(manifest(model=model), Role.PREFILL)


async def test_heads_that_ranks_cannot_share_are_refused_in_one_line() -> None:
    with pytest.raises(EngineError) as refused:
        await Driver.open(Role.PREFILL, "process", model={"tensor_parallel": 2})
    assert "attention heads (9) must be divisible by tensor parallel size (2)" in str(refused.value)
    assert len(str(refused.value)) < 200
