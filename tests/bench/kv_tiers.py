"""The tiers, on the CPU engine of this machine: what loading saves, and what saving costs.

What is compared runs in the same engine in turns, or in two engines at the same time: only ratios count.
"""

from __future__ import annotations

import asyncio
import math
import os
import pydoc_data.topics
import statistics
import time
from pathlib import Path

import msgspec

from llmserve.bus.messages import Role, Stage
from llmserve.kvstore.codec import DiskType
from llmserve.kvstore.stores.filesystem import FilesystemStore
from llmserve.manifests.machine import probe_machine
from llmserve.manifests.models import PACKAGED_ID, resolve_model
from llmserve.manifests.schema import KVCache, Manifest, StorageClass
from llmserve.manifests.sizes import with_dtype
from llmserve.workers.kv_pages import PageKeeper
from llmserve.workers.offload.settings import make_stores
from tests.s3_servers import BUCKET, s3_server
from tests.workers.engine_vllm.driver import Driver, body, manifest

TENANT = "bench"
PAGE_TOKENS = 128
PROMPT_TOKENS = 1500
ROUNDS = int(os.environ.get("KV_BENCH_ROUNDS", "5"))
SAVE_ROUNDS = 12
"""Pairs of turns: a turn's rate differs by some percent from the next one's."""
DECODES = 8
DECODE_TOKENS = 160


def texts(count: int, tokens: int) -> list[list[int]]:
    """Different prompts of English prose about Python, which every Python brings along."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve_model(PACKAGED_ID).path)
    topics = sorted(pydoc_data.topics.topics.items())
    ids: list[int] = tokenizer.encode("\n".join(text for _, text in topics))
    step = max(1, (len(ids) - tokens) // count)
    # Each begins with its own number, so that no two share a page.
    return [[*tokenizer.encode(f"Part {n}. "), *ids[n * step :]][:tokens] for n in range(count)]


def with_classes(*classes: StorageClass, disk: DiskType = "int8") -> Manifest:
    """The packaged model as users of this machine have it: in bf16, or in fp32 where bf16 is slow."""
    made = with_dtype(manifest(model={"id": PACKAGED_ID, "dtype": "auto"}), probe_machine())
    kv_cache = KVCache(prefix_caching=False, dram_gb=0.5, disk_dtype=disk) if classes else made.spec.kv_cache
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
    """Decode throughput lost where pages are kept, in DRAM and below it, beside a decode engine without any tiers; in
    turns, each of which begins with the other engine."""
    disk = StorageClass(name="disk", type="filesystem", path=str(folder))
    manifests = {"saving": with_classes(disk), "plain": with_classes()}
    engines = {name: await engine(made, role=Role.DECODE) for name, made in manifests.items()}
    prompts = iter(texts(len(engines) * DECODES * (SAVE_ROUNDS + 1), 200))
    rates: dict[str, list[float]] = {name: [] for name in engines}

    async def rate(driver: Driver) -> float:
        mine = [next(prompts) for _ in range(DECODES)]
        begun_s = time.perf_counter()
        ended = await asyncio.gather(
            *(driver.run(Stage.WHOLE, body(p, max_tokens=DECODE_TOKENS), tenant=TENANT) for p in mine)
        )
        return sum(len(one.tokens) for one in ended) / (time.perf_counter() - begun_s)

    try:
        for turn in range(SAVE_ROUNDS + 1):
            for name in list(engines)[:: 1 if turn % 2 else -1]:
                rates[name].append(await rate(engines[name]))
        pages = engines["saving"].tiers["disk"]["stores"]
        assert pages >= DECODES * SAVE_ROUNDS, pages
    finally:
        await asyncio.gather(*(driver.close() for driver in engines.values()))
    # The first turn warms up.
    saving, plain = rates["saving"][1:], rates["plain"][1:]
    costs = [1 - kept / without for kept, without in zip(saving, plain, strict=True)]
    return {
        "save_cost": statistics.median(costs),
        "save_cost_mean": statistics.fmean(costs),
        "save_cost_error": statistics.stdev(costs) / math.sqrt(len(costs)),
        "decode_tokens_s_saving": statistics.median(saving),
        "decode_tokens_s": statistics.median(plain),
        "pages_saved": float(pages),
    }


class Stalls:
    """How long others wait for the event loop: a task that sleeps 1 ms again and again."""

    def __init__(self) -> None:
        self.longest_ms = 0.0
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while True:
            begun_s = time.perf_counter()
            await asyncio.sleep(0.001)
            self.longest_ms = max(self.longest_ms, (time.perf_counter() - begun_s) * 1e3 - 1.0)

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


async def listing_s(folder: Path) -> dict[str, float]:
    """A new kv manager takes in 100,000 pages, and lists them once more."""
    from prometheus_client import CollectorRegistry

    from llmserve.kvstore.keys import PageKey

    for number in range(100_000):
        file = folder / PageKey("f00d" * 4, "t-a", number.to_bytes(4, "little") + bytes(28)).path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    made = with_classes(StorageClass(name="disk", type="filesystem", path=str(folder)))
    begun_s = time.perf_counter()
    keeper = PageKeeper(made, None, "kv", "host", CollectorRegistry())
    stalls = Stalls()
    running = asyncio.create_task(keeper.run())
    await keeper.ready.wait()
    seconds = time.perf_counter() - begun_s
    assert len(keeper.manager.pages(0)) == 100_000
    await stalls.stop()
    again_s, again = time.perf_counter(), Stalls()
    await keeper.list_again()
    again_s = time.perf_counter() - again_s
    await again.stop()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    return {
        "reindex_100k_pages_s": seconds,
        "reindex_longest_stall_ms": stalls.longest_ms,
        "relist_100k_pages_s": again_s,
        "relist_longest_stall_ms": again.longest_ms,
    }


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
    if wanted("listing"):
        made |= await listing_s(folder / "listing")
    if wanted("reading"):
        made |= await reading(folder / "reading")
    return made
