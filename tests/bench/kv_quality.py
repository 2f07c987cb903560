"""What int8 does to answers, on the CPU engine of this machine; and what it costs in bytes and time."""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmserve.bus.messages import Stage
from llmserve.kvstore.codec import Codec, PageKind, ValueType, read_header
from llmserve.kvstore.keys import parse_path
from llmserve.kvstore.quantize import quantize
from llmserve.kvstore.stores.filesystem import FilesystemStore
from llmserve.manifests.schema import StorageClass
from llmserve.workers.engine.vllm_outputs import decode_extra
from tests.bench.kv_tiers import PAGE_TOKENS, TENANT, engine, kept, texts, with_classes
from tests.workers.engine_vllm.driver import Collected, Driver, body

PROMPTS = int(os.environ.get("KV_BENCH_PROMPTS", "200"))
PROMPT_TOKENS = 300
OUTPUT_TOKENS = 16


@dataclass
class Said:
    """What a prompt's answer was."""

    tokens: list[int]
    logprobs: list[float]
    reused: int


async def answers(driver: Driver, prompts: list[list[int]]) -> list[Said]:
    """Greedy answers, one after the other, so that batches are alike."""
    said = []
    for prompt in prompts:
        data = body(prompt, max_tokens=OUTPUT_TOKENS, logprobs=0)
        ended = await driver.run(Stage.WHOLE, data, tenant=TENANT)
        said.append(Said(ended.tokens, list(logprobs(ended)), ended.first.cached_tokens or 0))
    return said


def logprobs(ended: Collected) -> Iterator[float]:
    for output in ended.outputs:
        if output.extra and (found := decode_extra(output.extra).new_logprobs) is not None:
            yield from (float(row[0]) for row in found.logprobs)


async def quality(folder: Path) -> dict[str, float]:
    """Answers after pages that went through int8, beside those after the same pages kept as they are; and how much
    answers differ for no more reason than that a prompt is computed at once instead of from its pages on."""
    raw, small = folder / "raw", folder / "int8"
    prompts = texts(PROMPTS, PROMPT_TOKENS)
    raw_class = StorageClass(name="raw", type="filesystem", path=str(raw))
    small_class = StorageClass(name="int8", type="filesystem", path=str(small))
    made = with_classes(raw_class, disk="raw")
    values: ValueType = "fp32" if made.spec.models.primary.dtype == "fp32" else "bf16"
    first = await engine(made)
    computed = await answers(first, prompts)
    pages = PROMPTS * (PROMPT_TOKENS // PAGE_TOKENS)
    await kept(raw_class, pages)
    await first.close()
    figures = await recode(raw, small, values)
    whole, quantized = await asyncio.gather(engine(made, 1), engine(with_classes(small_class), 1))
    try:
        exact, rounded = await asyncio.gather(answers(whole, prompts), answers(quantized, prompts))
    finally:
        await whole.close()
        await quantized.close()
    assert all(one.reused == PROMPT_TOKENS // PAGE_TOKENS * PAGE_TOKENS for one in (*exact, *rounded))
    figures |= differences("int8", exact, rounded) | differences("recompute", exact, computed)
    return figures | {"int8_prompts": float(PROMPTS)}


def differences(name: str, exact: list[Said], other: list[Said]) -> dict[str, float]:
    """How ``other`` differs from the answers after unquantized pages. Behind the first different token of an answer
    nothing can be compared: ``agreement`` counts all of that as different, ``token_agreement`` leaves it out."""
    agreed = [leading(a.tokens, b.tokens) for a, b in zip(exact, other, strict=True)]
    same = sum(a.tokens == b.tokens for a, b in zip(exact, other, strict=True))
    drifts = [
        abs(a.logprobs[n] - b.logprobs[n])
        for a, b, count in zip(exact, other, agreed, strict=True)
        for n in range(count)
    ]
    return {
        f"{name}_agreement": sum(agreed) / sum(len(one.tokens) for one in exact),
        f"{name}_token_agreement": sum(agreed) / (sum(agreed) + len(exact) - same),
        f"{name}_same_answers": same / len(exact),
        f"{name}_logprob_drift_mean": statistics.mean(drifts),
        f"{name}_logprob_drift_p99": statistics.quantiles(drifts, n=100)[98],
    }


def leading(one: list[int], other: list[int]) -> int:
    """Tokens until the first difference."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


async def recode(raw: Path, small: Path, values: ValueType) -> dict[str, float]:
    """Keep the raw pages of one folder as int8 in another; sizes beside those in bf16, speeds by the raw bytes."""
    source, target = FilesystemStore("raw", raw), FilesystemStore("int8", small)
    pages, stored, encode_s, decode_s, quantize_s = 0, 0, 0.0, 0.0, 0.0
    async for batch in source.listing("v1/"):
        for item in batch:
            data, key = await source.read(item.path), parse_path(item.path)
            assert data is not None
            assert key is not None
            kind = PageKind(values, read_header(data).page_bytes, 64)
            page = np.empty(kind.page_bytes, np.uint8)
            Codec(kind, "raw").decode(key, data, page)
            begun_s = time.perf_counter()
            encoded = Codec(kind, "int8").encode(key, page, read_header(data).parent)
            middle_s = time.perf_counter()
            Codec(kind, "int8").decode(key, encoded, np.empty_like(page))
            decode_s += time.perf_counter() - middle_s
            encode_s += middle_s - begun_s
            begun_s = time.perf_counter()
            quantize(page, values, 64)
            quantize_s += time.perf_counter() - begun_s
            await target.write(item.path, encoded)
            pages += kind.page_bytes
            stored += len(encoded)
    await source.close()
    await target.close()
    return {
        "int8_bytes_ratio": stored / (pages / 2 if values == "fp32" else pages),
        "int8_encode_gb_s": pages / encode_s / 1e9,
        "int8_decode_gb_s": pages / decode_s / 1e9,
        "int8_quantize_gb_s": pages / quantize_s / 1e9,
    }
