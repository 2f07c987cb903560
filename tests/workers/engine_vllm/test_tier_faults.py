"""A real engine whose storage classes fail in every way: its tokens are right each time; what heals is used again."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.s3_proxy import Fault
from tests.workers.engine_vllm.driver import Collected
from tests.workers.engine_vllm.kept import BLOCK, PAGES, WHEN_ASKED_FOR, Kept

pytestmark = [pytest.mark.vllm, pytest.mark.faults, WHEN_ASKED_FOR]

WHOLE = PAGES * BLOCK


def changed(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(change(file.read_bytes()))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": changed(lambda data: b""),
    "cut within its header": changed(lambda data: data[:40]),
    "cut": changed(lambda data: data[: len(data) // 2]),
    "longer": changed(lambda data: data + b"x"),
    "one bit": changed(lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]),
    "of another version": changed(lambda data: data[:4] + b"\x63" + data[5:]),
}


def has_size(file: Path, size: int) -> bool:
    return file.exists() and file.stat().st_size == size


@pytest.fixture(autouse=True)
def healed(kept: Kept) -> Iterator[None]:
    yield
    kept.s3.fault = ""


@pytest.mark.parametrize("number", [0, PAGES - 2])
async def test_damaged_pages_are_computed_and_kept_anew(kept: Kept, number: int) -> None:
    """One page of each prompt, damaged in another way."""
    bad = kept.counted("disk", "bad")
    prompts = await kept.all_kept(*(f"A page {damage}, {number}" for damage in DAMAGE))
    for damage, (prompt, answer) in zip(DAMAGE, prompts, strict=True):
        file = kept.files(prompt)[number]
        size = file.stat().st_size
        DAMAGE[damage](file)
        ended = await kept.ask(prompt)
        assert ended.tokens == answer, damage
        assert (ended.first.cached_tokens or 0) <= number * BLOCK, damage
        await kept.until(partial(has_size, file, size), "it is kept again")
    # DRAM holds the last four of them.
    for prompt, answer in prompts:
        again = await kept.ask(prompt)
        assert (again.first.cached_tokens, again.tokens) == (WHOLE, answer)
    damaged = bad + len(DAMAGE) - len(["missing"])
    await kept.until(lambda: kept.counted("disk", "bad") == damaged, "the damage is counted")


@pytest.mark.parametrize("fault", ["down", "slow", "busy", "expired", "cut"])
async def test_while_the_bucket_fails_what_is_in_it_is_computed_and_afterwards_it_is_loaded(
    kept: Kept, fault: Fault
) -> None:
    prompt, answer = await kept.kept(f"Bucket {fault}")
    kept.to_bucket(prompt)
    kept.s3.fault = fault
    ended = await kept.ask(prompt)
    assert (ended.first.cached_tokens, ended.tokens) == (0, answer)
    # Prompts of which nothing is known: the engine has to ask what the bucket has, unless it leaves it alone for
    # a while, since the fault before this one.
    numbers = itertools.count()
    async with asyncio.timeout(60):
        while True:
            unknown_prompt = kept.prompt(f"Unknown {fault} {next(numbers)}")
            unknown = await kept.ask(unknown_prompt)
            if fault in kept.s3.hit:
                break
            await asyncio.sleep(0.5)
    await kept.until(
        lambda: kept.counted("object", "failures"), "the failures are counted, though the engine is idle"
    )
    kept.s3.fault = ""

    async def loaded() -> bool:
        for file in kept.files(prompt):
            file.unlink(missing_ok=True)
        await kept.leave_dram()
        again = await kept.ask(prompt)
        assert again.tokens == answer
        return again.first.cached_tokens == WHOLE

    async with asyncio.timeout(20):
        while not await loaded():
            await asyncio.sleep(0.2)
    computed = await kept.ask(unknown_prompt, tenant="b")
    assert (computed.first.cached_tokens, computed.tokens) == (0, unknown.tokens)


@contextmanager
def full(folder: Path) -> Iterator[None]:
    filler = folder / "full"
    with pytest.raises(OSError, match="No space"):
        filler.write_bytes(bytes(shutil.disk_usage(folder).total))
    try:
        yield
    finally:
        filler.unlink()


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)


async def into_the_bucket(kept: Kept, where: str) -> tuple[list[int], Collected]:
    """A new prompt whose pages all went there, and its answer; the bucket may still be left alone for a while."""
    async with asyncio.timeout(40):
        for number in itertools.count():
            prompt = kept.prompt(f"Written {number} on a {where} disk")
            answer = await kept.ask(prompt)
            for _ in range(20):
                if kept.in_bucket(prompt):
                    return prompt, answer
                await asyncio.sleep(0.05)
    raise AssertionError("never reached")


@pytest.mark.parametrize("broken", [full, read_only])
async def test_on_a_disk_that_takes_nothing_reads_go_on_and_new_pages_go_to_the_bucket_until_it_does(
    kept: Kept, broken: Callable[[Path], object]
) -> None:
    if not kept.mounted:
        pytest.skip("no right to mount a filesystem")
    prompt, answer = await kept.kept(f"Read from a {broken.__name__} disk")
    with broken(kept.folder):  # type: ignore[attr-defined]
        ended = await kept.ask(prompt)
        assert (ended.first.cached_tokens, ended.tokens) == (WHOLE, answer)
        new, first = await into_the_bucket(kept, broken.__name__)
        assert not [file for file in kept.folder.rglob(".part-*") if file.is_file()]
        kept.s3.fault = "down"
        dropped = kept.counted("disk", "dropped")
        nowhere = kept.prompt(f"Beside a {broken.__name__} disk")
        lost = await kept.ask(nowhere)
        await kept.until(lambda: kept.counted("disk", "dropped") >= dropped + PAGES, "what is lost is counted")
        kept.s3.fault = ""
    await kept.leave_dram()
    assert not any(file.exists() for file in kept.files(new))
    again = await kept.ask(new)
    assert (again.first.cached_tokens, again.tokens) == (WHOLE, first.tokens)
    await kept.leave_dram()
    for text, tokens in ((new, first.tokens), (nowhere, lost.tokens)):
        computed = await kept.ask(text, tenant="b")
        assert (computed.first.cached_tokens, computed.tokens) == (0, tokens)


KEEPER = """
import asyncio, sys
from prometheus_client import CollectorRegistry
from llmserve.manifests.loader import parse
from llmserve.workers.kv_pages import PageKeeper
asyncio.run(PageKeeper(parse(sys.argv[1], "m"), None, "kv", "h", CollectorRegistry()).run())
"""


@contextmanager
def keeper(kept: Kept) -> Iterator[subprocess.Popen[bytes]]:
    """A kv role of its own, which moves pages that were idle for ten minutes from the folder to the bucket."""
    object_class = kept.classes[1]
    text = f"""
metadata: {{name: d}}
spec:
  models: {{primary: {{id: m}}}}
  kv_cache: {{eviction: {{hot_keep_secs: 1, evict_if_inactive_secs: 600}}}}
  storageClasses:
  - {{name: disk, type: filesystem, path: {kept.folder}}}
  - {{name: object, type: s3, bucket: {object_class.bucket}, region: r, endpoint_url: '{kept.s3.url}', timeout_s: 30}}
"""
    with subprocess.Popen([sys.executable, "-c", KEEPER, text]) as process:
        try:
            yield process
        finally:
            process.kill()


async def test_a_kv_role_killed_while_it_moves_pages_costs_none_and_its_successor_goes_on(kept: Kept) -> None:
    prompt, answer = await kept.kept("Moved by a kv role")
    files = kept.files(prompt)
    for file in files:
        os.utime(file, (file.stat().st_mtime - 1000,) * 2)
    kept.s3.fault = "stuck"
    with keeper(kept) as first:
        await kept.until(lambda: kept.s3.hit.get("stuck"), "it writes")
        first.kill()
    kept.s3.fault = ""
    assert all(file.exists() for file in files)
    assert not kept.in_bucket(prompt)
    ended = await kept.ask(prompt)
    assert (ended.first.cached_tokens, ended.tokens) == (WHOLE, answer)

    await kept.leave_dram()
    with keeper(kept):
        await kept.until(lambda: not any(file.exists() for file in files), "its successor has moved them")
    assert kept.in_bucket(prompt)
    again = await kept.ask(prompt)
    assert (again.first.cached_tokens, again.tokens) == (WHOLE, answer)
