"""One engine with two storage classes, both of which tests damage: a folder, and a bucket behind a faulty proxy."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from llmserve.bus.block_hashes import chain
from llmserve.bus.messages import Role, Stage
from llmserve.kvstore.keys import PageKey
from llmserve.manifests.schema import KVCache, StorageClass
from tests.made_up import HEAD_DIM, KV_HEADS, LAYERS
from tests.s3_proxy import FaultyS3, faulty_s3
from tests.s3_servers import BUCKET, s3_server
from tests.workers.engine_vllm.driver import Collected, Driver, body, manifest

BLOCK = 32
PAGES = 4
TOKENS = PAGES * BLOCK + 2
"""Of a prompt: all its full pages can be reused."""
KEY = "KV_TEST_KEY"
_DRAM_PAGES = 4 * PAGES
"""A quarter of them may wait to be written."""
_PAGE_GB = LAYERS * KV_HEADS * BLOCK * 2 * HEAD_DIM * 4 / 2**30
"""Layers x heads x tokens x (K, V) x values x bytes."""
_FOLDER_MB = 256
WHEN_ASKED_FOR = pytest.mark.skipif(
    "LLMSERVE_TIER_FAULTS" not in os.environ, reason="set LLMSERVE_TIER_FAULTS=1: 3 minutes"
)


@dataclass
class Kept:
    """The engine, and where it keeps what. Tenants' hashes are not salted."""

    engine: Driver
    classes: tuple[StorageClass, ...]
    s3: FaultyS3
    bucket: Any
    """A boto3 client past the proxy."""
    make_prompt: Callable[[int, str], list[int]]
    mounted: bool
    """Whether the folder is a filesystem of its own."""
    _fillers: int = 0

    @property
    def folder(self) -> Path:
        return Path(str(self.classes[0].path))

    def prompt(self, name: str) -> list[int]:
        return self.make_prompt(TOKENS, f"{name} is how it begins.")

    def keys(self, prompt: list[int], tenant: str = "a") -> list[PageKey]:
        """Of a prompt's pages, first to last."""
        return [PageKey(self.engine.info.fingerprint, f"t-{tenant}", block) for block in chain(prompt, BLOCK, "")]

    def files(self, prompt: list[int], tenant: str = "a") -> list[Path]:
        return [self.folder / key.path for key in self.keys(prompt, tenant)]

    def in_bucket(self, prompt: list[int], tenant: str = "a") -> bool:
        found = self.bucket.list_objects_v2(Bucket=BUCKET).get("Contents", [])
        return {key.path for key in self.keys(prompt, tenant)} <= {item["Key"] for item in found}

    def to_bucket(self, prompt: list[int], tenant: str = "a") -> None:
        """From the folder."""
        for key, file in zip(self.keys(prompt, tenant), self.files(prompt, tenant), strict=True):
            self.bucket.put_object(Bucket=BUCKET, Key=key.path, Body=file.read_bytes())
            file.unlink()

    async def ask(self, prompt: list[int], tenant: str = "a", **fields: Any) -> Collected:
        return await self.engine.run(Stage.WHOLE, body(prompt, 4, **fields), tenant=tenant)

    async def kept(self, name: str) -> tuple[list[int], list[int]]:
        """(a prompt, its answer), whose pages are in the folder alone."""
        ((prompt, answer),) = await self.all_kept(name)
        return prompt, answer

    async def all_kept(self, *names: str) -> list[tuple[list[int], list[int]]]:
        """The same of several."""
        kept = []
        for name in names:
            prompt = self.prompt(name)
            ended = await self.ask(prompt)
            assert ended.first.cached_tokens == 0
            await self.until(partial(self._in_folder, prompt), "its pages are kept")
            kept.append((prompt, ended.tokens))
        await self.leave_dram()
        return kept

    async def leave_dram(self) -> None:
        """Fill DRAM with others, again until they are in the folder too: what was there before is there no more."""
        filled = 0
        async with asyncio.timeout(120):
            while filled < _DRAM_PAGES:
                self._fillers += 1
                filler = self.prompt(f"Filler {self._fillers}")
                await self.ask(filler)
                for _ in range(100):
                    if self._in_folder(filler):
                        filled += PAGES
                        break
                    await asyncio.sleep(0.03)
                for file in self.files(filler):
                    file.unlink(missing_ok=True)

    def _in_folder(self, prompt: list[int]) -> bool:
        return all(file.exists() for file in self.files(prompt))

    async def until(self, condition: Callable[[], object], what: str) -> None:
        await self.engine.until(condition, what)

    def counted(self, tier: str, what: str) -> int:
        return self.engine.tiers[tier][what]


@asynccontextmanager
async def keeping(root: Path, prompt: Callable[[int, str], list[int]]) -> AsyncIterator[Kept]:
    import boto3

    folder = root / "pages"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_FOLDER_MB}m", "none", str(folder)]
    mounted = not subprocess.run(mount, capture_output=True).returncode
    try:
        with pytest.MonkeyPatch.context() as environment, s3_server("moto", root / "s3") as server:
            environment.setenv(KEY, bytes(range(32)).hex())
            with faulty_s3(server.url) as proxy:
                classes = (
                    StorageClass(name="disk", type="filesystem", path=str(folder)),
                    StorageClass(
                        name="object",
                        type="s3",
                        bucket=BUCKET,
                        region="us-east-1",
                        endpoint_url=proxy.url,
                        timeout_s=0.5,
                    ),
                )
                made = manifest(kv_space_gb=0.1)
                kv_cache = KVCache(
                    dram_gb=(_DRAM_PAGES + 0.1) * _PAGE_GB,
                    prefix_caching=False,
                    disk_dtype="zstd",
                    encryption=f"env:{KEY}",
                )
                spec = msgspec.structs.replace(made.spec, kv_cache=kv_cache, storageClasses=classes)
                engine = await Driver.of(msgspec.structs.replace(made, spec=spec), Role.BOTH, "process", BLOCK)
                client = boto3.client("s3", endpoint_url=server.url, region_name="us-east-1")
                try:
                    yield Kept(engine, classes, proxy, client, prompt, mounted)
                finally:
                    await engine.close()
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)
