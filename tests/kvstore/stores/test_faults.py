"""Stores whose disk is full or read-only, whose server is down, slow, busy, or refuses the credentials."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmserve.kvstore.stores.base import StoreError
from llmserve.kvstore.stores.filesystem import FilesystemStore
from llmserve.kvstore.stores.s3 import S3Store

PATH = "v1/f/all/t-a/00/00.0.kv"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 64 KB."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no right to mount: {mounted.stderr.decode().strip()}")
    try:
        yield tmp_path
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


async def test_a_full_disk_is_an_error_and_leaves_no_part_of_a_page(small_disk: Path) -> None:
    store = FilesystemStore("disk", small_disk)
    with pytest.raises(StoreError, match=r"disk: .*No space left"):
        await store.write(PATH, bytes(200_000))
    assert await store.read(PATH) is None
    assert not [file for file in small_disk.rglob("*") if file.is_file()]
    await store.write(PATH, b"fits")
    assert await store.read(PATH) == b"fits"
    await store.close()


async def test_a_read_only_disk_refuses_writes_and_still_reads(small_disk: Path) -> None:
    store = FilesystemStore("disk", small_disk)
    await store.write(PATH, b"data")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StoreError, match="Read-only"):
        await store.write(PATH.replace("00.0", "01.0"), b"data")
    assert await store.read(PATH) == b"data"
    await store.close()


async def test_reads_do_not_wait_for_writes_that_hang(tmp_path: Path) -> None:
    goes_on = threading.Event()

    class HangingStore(FilesystemStore):
        def _write(self, path: str, data: bytes) -> None:
            goes_on.wait()
            super()._write(path, data)

    store = HangingStore("disk", tmp_path, threads=2)
    (tmp_path / PATH).parent.mkdir(parents=True)
    (tmp_path / PATH).write_bytes(b"data")
    writes = [asyncio.create_task(store.write(f"{PATH}{number}", b"more")) for number in range(5)]
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        assert await store.read(PATH) == b"data"
        assert await store.contains([PATH]) == 1
    assert not any(write.done() for write in writes)
    goes_on.set()
    await asyncio.gather(*writes)
    await store.close()


async def test_a_process_killed_in_mid_write_leaves_what_is_no_page_and_is_swept_later(tmp_path: Path) -> None:
    """The child is stopped between the writing of the temporary file and its renaming."""
    script = f"""
import os, pathlib, signal
from llmserve.kvstore.stores.filesystem import FilesystemStore
os.rename = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
FilesystemStore("disk", {str(tmp_path)!r})._write({PATH!r}, b"half" * 1000)
"""
    ended = await asyncio.create_subprocess_exec(sys.executable, "-c", script)
    assert await ended.wait() == -9
    parts = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(parts) == 1
    store = FilesystemStore("disk", tmp_path)
    assert await store.read(PATH) is None
    assert [batch async for batch in store.listing("v1/")] == []
    assert parts[0].exists(), "it may be another worker's that still writes"
    os.utime(parts[0], (time.time() - 120,) * 2)
    assert [batch async for batch in store.listing("v1/")] == []
    assert not parts[0].exists()
    await store.close()


async def test_a_read_only_disk_with_a_dead_processs_temporary_file_is_listed_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = FilesystemStore("disk", tmp_path)
    await store.write(PATH, b"data")
    for number in range(2):
        part = (tmp_path / PATH).with_name(f".part-1-{number}")
        part.write_bytes(b"half")
        os.utime(part, (time.time() - 120,) * 2)

    def refused(path: object, **_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(os, "unlink", refused)
    for _ in range(2):
        assert [item.path async for batch in store.listing("v1/") for item in batch] == [PATH]
    assert len([record for record in caplog.records if "temporary files" in record.getMessage()]) == 1
    await store.close()


@asynccontextmanager
async def fake_server(status: str, code: str, delay_s: float = 0.0) -> AsyncIterator[tuple[str, list[float]]]:
    """An S3 server that answers everything alike; yields its URL and the times of the requests."""
    times: list[float] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                times.append(time.monotonic())
                await asyncio.sleep(delay_s)
                body = f"<Error><Code>{code}</Code><Message>m</Message></Error>".encode()
                head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
                writer.write(head.encode() + body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", times


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")


def s3(url: str, timeout_s: float = 20.0) -> S3Store:
    return S3Store("object", "pages", region="us-east-1", endpoint_url=url, timeout_s=timeout_s)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """For how long the S3 client was about to sleep; it does not."""
    import aiobotocore.endpoint

    slept: list[float] = []

    async def sleep(delay_s: float) -> None:
        slept.append(delay_s)

    monkeypatch.setattr(aiobotocore.endpoint, "asyncio", SimpleNamespace(**{**vars(asyncio), "sleep": sleep}))
    return slept


@pytest.mark.usefixtures("credentials")
async def test_a_busy_server_is_asked_again_after_pauses_and_then_given_up(pauses: list[float]) -> None:
    async with fake_server("503 Slow Down", "SlowDown") as (url, requests):
        store = s3(url)
        with pytest.raises(StoreError, match="object: SlowDown"):
            await store.read(PATH)
        assert len(requests) == 3
        # Jitter takes any part of one second, and then of two.
        assert len(pauses) == 2
        assert 0 < pauses[0] < 1
        assert 0 < pauses[1] < 2
        await store.close()


@pytest.mark.usefixtures("credentials")
async def test_expired_credentials_are_not_tried_again() -> None:
    async with fake_server("400 Bad Request", "ExpiredToken") as (url, times):
        store = s3(url)
        with pytest.raises(StoreError, match="object: ExpiredToken"):
            await store.read(PATH)
        assert len(times) == 1
        await store.close()


@pytest.mark.usefixtures("credentials")
async def test_a_server_that_hangs_costs_the_deadline_and_no_more() -> None:
    async with fake_server("200 OK", "", delay_s=30) as (url, _):
        store = s3(url, timeout_s=0.5)
        begun = time.monotonic()
        with pytest.raises(StoreError, match=r"no answer within 0\.5 s"):
            await store.read(PATH)
        assert time.monotonic() - begun < 5
        await store.close()


@pytest.mark.usefixtures("credentials")
async def test_a_server_that_is_down_is_an_error() -> None:
    store = s3("http://127.0.0.1:9")
    with pytest.raises(StoreError, match="object: "):
        await store.write(PATH, b"data")
    await store.close()


async def test_without_credentials_it_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    store = s3("http://127.0.0.1:9")
    with pytest.raises(StoreError, match="credentials"):
        await store.read(PATH)
    await store.close()
