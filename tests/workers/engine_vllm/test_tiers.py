"""Real engines with tiers: pages outlive the engine that computed them, and the tokens are the same."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from llmserve.bus.messages import Role, Stage
from llmserve.manifests.schema import KVCache, StorageClass
from tests.workers.engine_vllm.driver import Driver, Pair, body, manifest

Prompt = Callable[[int, str], list[int]]
PAGE_TOKENS = 128


async def engine(folder: Path, **kv_cache: Any) -> Driver:
    """A prefill engine, which hands over and keeps pages: two connectors in one."""
    made = manifest(lease_s=8.0)
    spec = msgspec.structs.replace(
        made.spec,
        kv_cache=KVCache(dram_gb=0.125, **kv_cache),
        storageClasses=(StorageClass(name="disk", type="filesystem", path=str(folder)),),
    )
    return await Driver.of(msgspec.structs.replace(made, spec=spec), Role.PREFILL, "process")


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.kv"))


@dataclass
class Restarted:
    """An engine that found the pages of one before it."""

    folder: Path
    engine: Driver
    texts: dict[str, list[int]]
    """Prompts by name."""
    tokens: dict[str, list[int]]
    """What the first engine answered."""


@pytest.fixture(scope="module")
async def restarted(tmp_path_factory: pytest.TempPathFactory, prompt: Prompt) -> AsyncIterator[Restarted]:
    folder = tmp_path_factory.mktemp("pages")
    texts = {name: prompt(700, f"{name} begins the story.") for name in ("kept", "handed", "other", "bad", "cut")}
    first = await engine(folder)
    tokens: dict[str, list[int]] = {}
    try:
        for name, text in texts.items():
            known = files(folder)
            ended = await first.run(Stage.WHOLE, body(text), tenant="a")
            tokens[name] = ended.tokens
            await first.until(lambda known=known: len(files(folder)) == len(known) + 5, "the pages are kept")
            if name in ("bad", "cut"):
                for file in set(files(folder)) - set(known):
                    data = bytearray(file.read_bytes())
                    data[len(data) // 2] ^= 1
                    file.write_bytes(data if name == "bad" else data[:1000])
    finally:
        await first.close()
    second = await engine(folder)
    yield Restarted(folder, second, texts, tokens)
    await second.close()


async def test_a_new_engine_finds_the_pages_of_the_last_and_says_the_same(restarted: Restarted) -> None:
    ended = await restarted.engine.run(Stage.WHOLE, body(restarted.texts["kept"]), tenant="a")
    assert ended.first.cached_tokens == 5 * PAGE_TOKENS
    assert ended.tokens == restarted.tokens["kept"]
    await restarted.engine.until(lambda: restarted.engine.tiers["disk"]["loads"] >= 5, "loads are counted")


async def test_what_comes_from_disk_is_handed_over(restarted: Restarted, pair: Pair) -> None:
    data = body(restarted.texts["handed"])
    first = await restarted.engine.run(Stage.PREFILL, data, tenant="a")
    assert first.first.cached_tokens == 5 * PAGE_TOKENS
    assert (first.tokens + (await pair.decoded(data, first)).tokens) == restarted.tokens["handed"]


async def test_another_tenant_computes_the_same_prompt_itself_even_if_the_pages_lie_under_its_name(
    restarted: Restarted,
) -> None:
    """They are not encrypted: the checksum alone binds them to the name."""
    for file in files(restarted.folder):
        planted = Path(str(file).replace("/t-a/", "/t-b/"))
        planted.parent.mkdir(parents=True, exist_ok=True)
        planted.write_bytes(file.read_bytes())
    bad = restarted.engine.tiers["disk"]["bad"]
    ended = await restarted.engine.run(Stage.WHOLE, body(restarted.texts["other"]), tenant="b")
    assert ended.first.cached_tokens == 0
    assert ended.tokens == restarted.tokens["other"]
    await restarted.engine.until(lambda: restarted.engine.tiers["disk"]["bad"] > bad, "it was seen")


@pytest.mark.parametrize("name", ["bad", "cut"])
async def test_damaged_pages_are_computed_again_and_replaced(restarted: Restarted, name: str) -> None:
    before = restarted.engine.tiers["disk"]["bad"]
    ended = await restarted.engine.run(Stage.WHOLE, body(restarted.texts[name]), tenant="a")
    assert ended.first.cached_tokens == 0
    assert ended.tokens == restarted.tokens[name]
    await restarted.engine.until(lambda: restarted.engine.tiers["disk"]["bad"] > before, "the damage is counted")
