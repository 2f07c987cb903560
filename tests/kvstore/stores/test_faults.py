"""Stores whose disk is full or read-only, whose server is down, slow, busy, or refuses the credentials."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from botocore.parsers import ResponseParserError

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


class FakeServer:
    """An S3 server that answers everything alike."""

    def __init__(self, status: str, code: str, delay_s: float) -> None:
        self.status = status
        self.body = f"<Error><Code>{code}</Code><Message>m</Message></Error>"
        self.delay_s = delay_s
        self.hangs_after = 10**9
        """Requests."""
        self.url = ""
        self.times: list[float] = []
        """Of the requests."""

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while request := await reader.readuntil(b"\r\n\r\n"):
                self.times.append(time.monotonic())
                await asyncio.sleep(60 if len(self.times) > self.hangs_after else self.delay_s)
                body = self.body.encode()
                head = f"HTTP/1.1 {self.status}\r\nContent-Type: text/xml\r\nContent-Length: {len(body)}\r\n\r\n"
                writer.write(head.encode() + (b"" if request.startswith(b"HEAD") else body))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()


@asynccontextmanager
async def faked_server(status: str, code: str, delay_s: float = 0.0) -> AsyncIterator[FakeServer]:
    made = FakeServer(status, code, delay_s)
    server = await asyncio.start_server(made.answer, "127.0.0.1", 0)
    async with server:
        made.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield made


@asynccontextmanager
async def fake_server(status: str, code: str, delay_s: float = 0.0) -> AsyncIterator[tuple[str, list[float]]]:
    """Its URL and the times of the requests."""
    async with faked_server(status, code, delay_s) as made:
        yield made.url, made.times


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
async def test_the_wait_for_a_connection_is_within_the_deadline() -> None:
    async with faked_server("200 OK", "", delay_s=60) as server:
        store = s3(server.url, timeout_s=0.5)
        reads = await asyncio.gather(*(store.read(PATH) for _ in range(100)), return_exceptions=True)
        assert all(isinstance(result, StoreError) for result in reads)
        # Those that waited for others' connections gave up with them.
        assert len(server.times) < 50
        await store.close()


@pytest.mark.usefixtures("credentials")
async def test_after_its_first_failure_a_touch_makes_no_more_calls() -> None:
    async with faked_server("400 Bad Request", "ExpiredToken") as server:
        store = s3(server.url)
        with pytest.raises(StoreError, match="object: ExpiredToken"):
            await store.touch([PATH] * 320)
        with pytest.raises(StoreError, match="object: ExpiredToken"):
            await store.read(PATH)
        assert len(server.times) < 40
        await store.close()


@pytest.mark.usefixtures("credentials")
async def test_all_of_many_paths_are_touched() -> None:
    async with faked_server("404 Not Found", "NoSuchKey") as server:
        store = s3(server.url)
        await store.touch([PATH] * 50)
        assert len(server.times) == 50
        await store.close()


@pytest.mark.usefixtures("credentials")
async def test_what_a_bucket_could_say_before_the_deadline_counts() -> None:
    async with faked_server("200 OK", "") as server:
        store = s3(server.url)
        assert await store.contains([PATH]) == 1
        server.hangs_after = 101
        assert await store.contains_within([PATH] * 1000, 2.0) == 100
        with pytest.raises(StoreError, match=r"no answer within 0\.1 s which of 1000 pages it has"):
            await store.contains_within([PATH] * 1000, 0.1)
        await store.close()


@pytest.mark.usefixtures("credentials")
async def test_a_failure_beyond_the_first_gap_does_not_count() -> None:
    async with faked_server("404 Not Found", "NoSuchKey") as server:
        store = s3(server.url, timeout_s=5.0)
        server.hangs_after = 1
        assert await store.contains([PATH] * 100) == 0
        await store.close()


async def test_what_a_disk_could_say_before_the_deadline_counts(tmp_path: Path) -> None:
    goes_on = threading.Event()

    class HangingStore(FilesystemStore):
        def _contains(self, paths: Sequence[str]) -> int:
            if "bad" in paths:
                goes_on.wait()
            return super()._contains(paths)

    store = HangingStore("disk", tmp_path)
    paths = [f"{number}.kv" for number in range(300)]
    for path in paths:
        (tmp_path / path).touch()
    assert 0 < await store.contains_within([*paths, "bad"], 1.0) < 300
    with pytest.raises(StoreError, match=r"disk: no answer within 0\.1 s which of 1 pages it has"):
        await store.contains_within(["bad"], 0.1)
    goes_on.set()
    await store.close()


@pytest.mark.parametrize(
    "error",
    [
        ResponseParserError("a proxy's page"),
        KeyError("LastModified"),
        RuntimeError(),
        ExceptionGroup("all", [OSError()]),
    ],
    ids=repr,
)
async def test_whatever_its_libraries_raise_is_an_error_of_the_store(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """aiohttp cancels a write of its own if the server answers before all of an object was sent."""

    async def fail(store: S3Store) -> None:
        raise error

    monkeypatch.setattr(S3Store, "_opened", fail)
    with pytest.raises(StoreError, match="object: "):
        await s3("http://127.0.0.1:9").head(PATH, 80)


@pytest.mark.usefixtures("credentials")
async def test_a_call_that_is_cancelled_ends_so() -> None:
    async with faked_server("200 OK", "", delay_s=60) as server:
        store = s3(server.url)
        reading = asyncio.create_task(store.read(PATH))
        while not server.times:
            await asyncio.sleep(0.01)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
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
