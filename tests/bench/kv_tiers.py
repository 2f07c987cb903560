"""The tiers, on the CPU engine of this machine: what loading saves, what saving costs, what int8 does to quality.

What is compared runs in the same engine in turns, or in two engines at the same time: only ratios count.
"""

from __future__ import annotations

import asyncio
import os
import pydoc_data.topics
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from llmserve.bus.messages import Role, Stage
from llmserve.kvstore.codec import Codec, DiskType, PageKind, read_header
from llmserve.kvstore.keys import parse_path
from llmserve.kvstore.stores.filesystem import FilesystemStore
from llmserve.manifests.models import resolve_model
from llmserve.manifests.schema import KVCache, Manifest, StorageClass
from llmserve.workers.engine.vllm_outputs import decode_extra
from llmserve.workers.kv_pages import PageKeeper
from llmserve.workers.offload.settings import make_stores
from tests.s3_servers import BUCKET, s3_server
from tests.workers.engine_vllm.driver import MODEL, Collected, Driver, body, manifest

TENANT = "bench"
PAGE_TOKENS = 128
PROMPT_TOKENS = 1500
ROUNDS = int(os.environ.get("KV_BENCH_ROUNDS", "5"))
PROMPTS = int(os.environ.get("KV_BENCH_PROMPTS", "200"))
QUALITY_PROMPT_TOKENS = 300
QUALITY_OUTPUT_TOKENS = 16
DECODES = 8
DECODE_TOKENS = 160


def texts(count: int, tokens: int) -> list[list[int]]:
    """Different prompts of English prose about Python, which every Python brings along."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve_model(MODEL).path)
    topics = sorted(pydoc_data.topics.topics.items())
    ids: list[int] = tokenizer.encode("\n".join(text for _, text in topics))
    step = max(1, (len(ids) - tokens) // count)
    # Each begins with its own number, so that no two share a page.
    return [[*tokenizer.encode(f"Part {n}. "), *ids[n * step :]][:tokens] for n in range(count)]


def with_classes(*classes: StorageClass, disk: DiskType = "int8") -> Manifest:
    made = manifest()
    kv_cache = KVCache(prefix_caching=False, dram_gb=0.25, disk_dtype=disk) if classes else made.spec.kv_cache
    spec = msgspec.structs.replace(made.spec, kv_cache=kv_cache, storageClasses=classes)
    return msgspec.structs.replace(made, spec=spec)


async def engine(made: Manifest, threads: int = 2, role: Role = Role.BOTH) -> Driver:
    return await Driver.of(made, role, "process", threads=threads)


async def first_token_s(driver: Driver, prompt: list[int]) -> tuple[float, int]:
    """(seconds to the first token, prompt tokens that were not computed)."""
    begun_s = time.perf_counter()
    ended = await driver.run(Stage.WHOLE, body(prompt, max_tokens=1), tenant=TENANT)
    return time.perf_counter() - begun_s, ended.first.cached_tokens or 0


async def kept(storage: StorageClass, pages: int) -> None:
    """Wait until the class holds so many pages: they are written behind the engine's back."""
    (store,) = make_stores((storage,))
    async with asyncio.timeout(60):
        while True:
            found = [item async for batch in store.listing("v1/") for item in batch]
            if len(found) >= pages:
                break
            await asyncio.sleep(0.2)
    await store.close()


async def ttft_ratio(storage: StorageClass, name: str) -> dict[str, float]:
    """TTFT of prompts that a worker before this one has served, over that of new prompts of the same length."""
    made = with_classes(storage)
    prompts = texts(2 * ROUNDS + 4, PROMPT_TOKENS)
    known, new = prompts[: ROUNDS + 1], prompts[ROUNDS + 1 :]
    first = await engine(made)
    for prompt in known:
        await first_token_s(first, prompt)
    pages = len(known) * (PROMPT_TOKENS // PAGE_TOKENS)
    await kept(storage, pages)
    await first.close()
    second = await engine(made)
    loads: list[float] = []
    computes: list[float] = []
    try:
        await first_token_s(second, new.pop())
        await first_token_s(second, known.pop())
        for prompt in known:
            seconds, reused = await first_token_s(second, prompt)
            assert reused == PROMPT_TOKENS // PAGE_TOKENS * PAGE_TOKENS, (name, reused)
            loads.append(seconds)
            computes.append((await first_token_s(second, new.pop()))[0])
    finally:
        await second.close()
    load_s, compute_s = statistics.median(loads), statistics.median(computes)
    return {
        f"{name}_ttft_ratio": load_s / compute_s,
        f"{name}_ttft_s": load_s,
        f"{name}_recompute_ttft_s": compute_s,
    }


async def save_cost(folder: Path) -> dict[str, float]:
    """Decode throughput lost where pages are kept, beside a decode engine that keeps none; in turns."""
    disk = StorageClass(name="disk", type="filesystem", path=str(folder))
    saving = await engine(with_classes(disk), role=Role.DECODE)
    plain = await engine(with_classes(), role=Role.DECODE)
    prompts = iter(texts(2 * DECODES * (ROUNDS + 1), 200))

    async def rate(driver: Driver) -> float:
        mine = [next(prompts) for _ in range(DECODES)]
        begun_s = time.perf_counter()
        ended = await asyncio.gather(
            *(driver.run(Stage.WHOLE, body(p, max_tokens=DECODE_TOKENS), tenant=TENANT) for p in mine)
        )
        return sum(len(one.tokens) for one in ended) / (time.perf_counter() - begun_s)

    try:
        await rate(saving)
        await rate(plain)
        pairs = [(await rate(saving), await rate(plain)) for _ in range(ROUNDS)]
        pages = saving.tiers["disk"]["stores"]
        assert pages >= DECODES * ROUNDS, pages
    finally:
        await saving.close()
        await plain.close()
    with_saving, without = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {
        "save_cost": 1 - with_saving / without,
        "decode_tokens_s_saving": with_saving,
        "decode_tokens_s": without,
        "pages_saved": float(pages),
    }


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
        data = body(prompt, max_tokens=QUALITY_OUTPUT_TOKENS, logprobs=0)
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
    prompts = texts(PROMPTS, QUALITY_PROMPT_TOKENS)
    raw_class = StorageClass(name="raw", type="filesystem", path=str(raw))
    small_class = StorageClass(name="int8", type="filesystem", path=str(small))
    first = await engine(with_classes(raw_class, disk="raw"))
    computed = await answers(first, prompts)
    pages = PROMPTS * (QUALITY_PROMPT_TOKENS // PAGE_TOKENS)
    await kept(raw_class, pages)
    await first.close()
    figures = await recode(raw, small)
    whole, quantized = await asyncio.gather(
        engine(with_classes(raw_class, disk="raw"), 1), engine(with_classes(small_class), 1)
    )
    try:
        exact, rounded = await asyncio.gather(answers(whole, prompts), answers(quantized, prompts))
    finally:
        await whole.close()
        await quantized.close()
    assert all(one.reused == QUALITY_PROMPT_TOKENS // PAGE_TOKENS * PAGE_TOKENS for one in (*exact, *rounded))
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


async def recode(raw: Path, small: Path) -> dict[str, float]:
    """Keep the raw pages of one folder as int8 in another; sizes and speeds."""
    source, target = FilesystemStore("raw", raw), FilesystemStore("int8", small)
    pages, stored, encode_s, decode_s, quantize_s = 0, 0, 0.0, 0.0, 0.0
    async for batch in source.listing("v1/"):
        for item in batch:
            data, key = await source.read(item.path), parse_path(item.path)
            assert data is not None
            assert key is not None
            kind = PageKind("bf16", read_header(data).page_bytes, 64)
            page = np.empty(kind.page_bytes, np.uint8)
            Codec(kind, "raw").decode(key, data, page)
            begun_s = time.perf_counter()
            encoded = Codec(kind, "int8").encode(key, page, read_header(data).parent)
            middle_s = time.perf_counter()
            Codec(kind, "int8").decode(key, encoded, np.empty_like(page))
            decode_s += time.perf_counter() - middle_s
            encode_s += middle_s - begun_s
            begun_s = time.perf_counter()
            quantized(page)
            quantize_s += time.perf_counter() - begun_s
            await target.write(item.path, encoded)
            pages += kind.page_bytes
            stored += len(encoded)
    await source.close()
    await target.close()
    return {
        "int8_bytes_ratio": stored / pages,
        "int8_encode_gb_s": pages / encode_s / 1e9,
        "int8_decode_gb_s": pages / decode_s / 1e9,
        "int8_quantize_gb_s": pages / quantize_s / 1e9,
    }


def quantized(page: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
    from llmserve.kvstore.quantize import quantize

    assert quantize(page, "bf16", 64) is not None


async def listing_s(folder: Path) -> dict[str, float]:
    """A new kv manager takes in 100,000 pages."""
    from prometheus_client import CollectorRegistry

    from llmserve.kvstore.keys import PageKey

    for number in range(100_000):
        file = folder / PageKey("f00d" * 4, "t-a", number.to_bytes(4, "little") + bytes(28)).path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    made = with_classes(StorageClass(name="disk", type="filesystem", path=str(folder)))
    begun_s = time.perf_counter()
    keeper = PageKeeper(made, None, "kv", "host", CollectorRegistry())
    running = asyncio.create_task(keeper.run())
    await keeper.ready.wait()
    seconds = time.perf_counter() - begun_s
    assert len(keeper.manager.pages(0)) == 100_000
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    return {"reindex_100k_pages_s": seconds}


async def reading(folder: Path) -> dict[str, float]:
    """Files of a page's size, one after the other, through our pool of threads and through aiofiles."""
    import aiofiles

    store, count = FilesystemStore("disk", folder), 100
    paths = [f"read/{number:03}" for number in range(count)]
    for path in paths:
        await store.write(path, os.urandom(1_400_000))

    async def with_aiofiles(path: str) -> None:
        async with aiofiles.open(folder / path, "rb") as file:
            await file.read()

    async def with_pool(path: str) -> None:
        await store.read(path)

    seconds = {}
    for _ in range(2):
        for name, read in (("pool", with_pool), ("aiofiles", with_aiofiles)):
            begun_s = time.perf_counter()
            for path in paths:
                await read(path)
            seconds[name] = (time.perf_counter() - begun_s) / count
    await store.close()
    return {f"read_{name}_ms": value * 1e3 for name, value in seconds.items()}


async def figures(folder: Path, only: str = "") -> dict[str, float]:
    """All of them, or the one section ``only``."""
    made: dict[str, float] = {}

    def wanted(section: str) -> bool:
        return only in ("", section)

    if wanted("nvme"):
        disk = StorageClass(name="disk", type="filesystem", path=str(folder / "nvme"))
        made |= await ttft_ratio(disk, "nvme")
    if wanted("s3"):
        with s3_server("moto", folder / "moto") as server:
            bucket = StorageClass(
                name="object", type="s3", bucket=BUCKET, region="us-east-1", endpoint_url=server.url, prefix="bench"
            )
            made |= await ttft_ratio(bucket, "s3")
    if wanted("save"):
        made |= await save_cost(folder / "save")
    if wanted("quality"):
        made |= await quality(folder / "quality")
    if wanted("listing"):
        made |= await listing_s(folder / "listing")
    if wanted("reading"):
        made |= await reading(folder / "reading")
    return made
