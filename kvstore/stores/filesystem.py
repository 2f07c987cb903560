"""Pages as files below a folder, usually of an NVMe disk.

A file is written under a temporary name and renamed: a crash leaves no half page under a page's name. The time of
last use is the file's mtime, set on ``touch``, since most systems are mounted without access times.

Calls run on pools of threads, writes on one of their own, so that no request waits for a write. ``aiofiles`` does the
same with one hop for each open, read and close: reading 1.4 MB pages from the page cache it took 1.3 to 1.6 times as
long (``make bench-kv`` prints both).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import mmap
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from llmserve.kvstore.priority import yield_to_the_engine
from llmserve.kvstore.stores.base import PageStore, Stored, StoreError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_TEMPORARY = ".part-"
_TEMPORARY_S = 60.0
"""A temporary file this old is of a process that died."""
_BATCH = 2000
_ALIGNMENT = 4096
_DIRECT: int = getattr(os, "O_DIRECT", 0)


class FilesystemStore(PageStore):
    """One folder. ``fsync`` makes each page safe from power cuts before it counts; without it they are only misses.
    ``direct`` reads and writes past the page cache; see ``direct_problem``."""

    shared = False

    def __init__(
        self,
        name: str,
        root: str | Path,
        *,
        fsync: bool = False,
        direct: bool = False,
        threads: int = 4,
        timeout_s: float = 30.0,
    ) -> None:
        self.name = name
        self._root = Path(root)
        self._fsync = fsync
        self._direct = direct
        self._timeout_s = timeout_s
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=f"pages-{name}")
        self._writers = ThreadPoolExecutor(
            threads, thread_name_prefix=f"writes-{name}", initializer=yield_to_the_engine
        )
        self._numbers = itertools.count()
        self._sweeps = True
        """Temporary files of dead processes could be removed so far."""

    async def read(self, path: str) -> bytes | None:
        return await self._run(lambda: self._read(path))

    async def head(self, path: str, size_bytes: int) -> bytes | None:
        return await self._run(lambda: self._head(path, size_bytes))

    async def write(self, path: str, data: bytes) -> None:
        await self._run(lambda: self._write(path, data), self._writers)

    async def contains(self, paths: Sequence[str]) -> int:
        return await self._run(lambda: self._contains(paths))

    async def delete(self, paths: Sequence[str]) -> None:
        await self._run(lambda: self._delete(paths))

    async def touch(self, paths: Sequence[str]) -> None:
        await self._run(lambda: self._touch(paths))

    async def listing(self, prefix: str) -> AsyncIterator[list[Stored]]:
        batches = self._list(prefix)
        while (batch := await self._run(lambda: next(batches, None))) is not None:
            yield batch

    async def expect(self, paths: Sequence[str]) -> None:
        # Into the page cache: the node's DRAM.
        if not self._direct:
            await self._run(lambda: self._advise(paths))

    async def close(self) -> None:
        for pool in (self._pool, self._writers):
            pool.shutdown(wait=False, cancel_futures=True)

    async def _run(self, call: Callable[[], T], pool: Executor | None = None) -> T:
        # A disk that hangs keeps a thread, and what it yields in the end goes nowhere.
        running = asyncio.get_running_loop().run_in_executor(pool or self._pool, call)
        try:
            return await asyncio.wait_for(running, self._timeout_s)
        except TimeoutError as error:
            raise StoreError(f"{self.name}: no answer within {self._timeout_s:g} s") from error
        except (OSError, RuntimeError) as error:
            raise StoreError(f"{self.name}: {error}") from error

    # -- in the pool --------------------------------------------------------------------------------------------

    def _read(self, path: str) -> bytes | None:
        try:
            if self._direct:
                return _read_direct(self._root / path)
            with open(self._root / path, "rb", buffering=0) as file:
                return file.read()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _head(self, path: str, size_bytes: int) -> bytes | None:
        try:
            with open(self._root / path, "rb", buffering=0) as file:
                return file.read(size_bytes)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _write(self, path: str, data: bytes) -> None:
        target = self._root / path
        part = target.with_name(f"{_TEMPORARY}{os.getpid()}-{next(self._numbers)}")
        try:
            try:
                self._fill(part, data)
            except FileNotFoundError:
                target.parent.mkdir(parents=True, exist_ok=True)
                self._fill(part, data)
            os.rename(part, target)
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink()
            raise
        if self._fsync:
            _sync_folder(target.parent)

    def _fill(self, part: Path, data: bytes) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        descriptor = os.open(part, flags | (_DIRECT if self._direct else 0), 0o600)
        try:
            if self._direct:
                _write_direct(descriptor, data)
            else:
                _write_all(descriptor, data)
            if self._fsync:
                os.fdatasync(descriptor)
        finally:
            os.close(descriptor)

    def _contains(self, paths: Sequence[str]) -> int:
        for count, path in enumerate(paths):
            if not (self._root / path).is_file():
                return count
        return len(paths)

    def _delete(self, paths: Sequence[str]) -> None:
        for path in paths:
            (self._root / path).unlink(missing_ok=True)

    def _touch(self, paths: Sequence[str]) -> None:
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                os.utime(self._root / path)

    def _advise(self, paths: Sequence[str]) -> None:
        for path in paths:
            with contextlib.suppress(FileNotFoundError), open(self._root / path, "rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    def _list(self, prefix: str) -> Iterator[list[Stored]]:
        batch: list[Stored] = []
        folder, _, _ = prefix.rpartition("/")
        now_s = time.time()
        for path, size_bytes, used_s in _files(str(self._root), folder):
            if _TEMPORARY in path:
                if now_s - used_s > _TEMPORARY_S:
                    self._sweep(path)
            elif path.startswith(prefix):
                batch.append(Stored(path, size_bytes, used_s))
            if len(batch) == _BATCH:
                yield batch
                batch = []
        if batch:
            yield batch

    def _sweep(self, path: str) -> None:
        try:
            (self._root / path).unlink(missing_ok=True)
        except OSError as error:
            # Of a disk that has become read-only the pages are of use all the same.
            if self._sweeps:
                logger.warning("%s: temporary files of dead processes stay: %s", self.name, error)
            self._sweeps = False


def _files(root: str, folder: str) -> Iterator[tuple[str, int, float]]:
    """(path below ``root``, size, mtime) of all files in ``folder`` and below."""
    try:
        entries = os.scandir(f"{root}/{folder}" if folder else root)
    except (FileNotFoundError, NotADirectoryError):
        return
    with entries:
        for entry in entries:
            path = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir(follow_symlinks=False):
                yield from _files(root, path)
                continue
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            yield path, status.st_size, status.st_mtime


def _write_all(descriptor: int, data: bytes | memoryview) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _write_direct(descriptor: int, data: bytes) -> None:
    """``O_DIRECT`` writes whole aligned pieces from aligned memory; what is too much is cut off again."""
    padded = -(-len(data) // _ALIGNMENT) * _ALIGNMENT
    with mmap.mmap(-1, max(padded, _ALIGNMENT)) as buffer:
        buffer[: len(data)] = data
        with memoryview(buffer) as view, view[:padded] as part:
            _write_all(descriptor, part)
    os.ftruncate(descriptor, len(data))


def _read_direct(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | _DIRECT)
    try:
        size_bytes = os.fstat(descriptor).st_size
        padded = max(_ALIGNMENT, -(-size_bytes // _ALIGNMENT) * _ALIGNMENT)
        with mmap.mmap(-1, padded) as buffer:
            read = os.readv(descriptor, [buffer])
            while read < size_bytes:
                with memoryview(buffer) as view, view[read:] as rest:
                    more = os.readv(descriptor, [rest])
                if not more:
                    break
                read += more
            return buffer[: min(read, size_bytes)]
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def direct_problem(root: str | Path) -> str | None:
    """Why files below ``root`` cannot be read past the page cache; None if they can. Writes and removes a file."""
    folder = Path(root)
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    if not _DIRECT:
        return "this system has no O_DIRECT"
    probe = folder / f"{_TEMPORARY}{os.getpid()}-probe"
    try:
        descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _DIRECT, 0o600)
        try:
            _write_direct(descriptor, b"probe")
        finally:
            os.close(descriptor)
        return None if _read_direct(probe) == b"probe" else "O_DIRECT reads back something else"
    except OSError as error:
        return f"O_DIRECT: {error.strerror}"
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
