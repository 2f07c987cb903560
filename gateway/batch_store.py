"""Files, batches and results of lines on JetStream, each tenant's apart."""

from __future__ import annotations

import hashlib
import math
import time
import uuid
from collections.abc import AsyncIterable, AsyncIterator, Callable
from typing import TypeVar

import msgspec

from llmserve.bus.base import BusError
from llmserve.bus.jetstream import WRONG_LAST_SEQUENCE, ApiError, JetStream
from llmserve.bus.keyvalue import Entry, KeyValue
from llmserve.bus.objects import ObjectStore
from llmserve.bus.streams import FILE_AGE_S
from llmserve.bus.subjects import Subjects
from llmserve.gateway.batch_records import WINDOW_S, Batch, FileObject, LineResult

T = TypeVar("T", FileObject, Batch)

LINE_MAX_BYTES = 1 << 20


class NotFound(Exception):
    """The tenant has no such file or batch."""


class TooLong(Exception):
    """A line of a file is longer than a request may be; carries its number."""


class BatchStore:
    """Every operation raises ``BusUnavailable`` when the bus is away for too long."""

    def __init__(self, api: JetStream, subjects: Subjects) -> None:
        self._api = api
        self._subjects = subjects
        self._objects = ObjectStore(api, subjects.file_bucket)
        self.keys = KeyValue(api, subjects.batch_bucket)

    # -- files -------------------------------------------------------------------------------------------------------

    async def add_file(
        self, tenant: str, filename: str, purpose: str, pieces: AsyncIterable[bytes], file_id: str | None = None
    ) -> FileObject:
        file_id = file_id or f"file-{uuid.uuid4().hex}"
        info = await self._objects.put(f"{tenant}.{file_id}", pieces)
        now = math.floor(time.time())
        file = FileObject(
            id=file_id,
            bytes=info.size,
            created_at=now,
            expires_at=now + math.floor(FILE_AGE_S),
            filename=filename,
            purpose=purpose,
        )
        await self.keys.put(f"file.{tenant}.{file_id}", msgspec.json.encode(file))
        return file

    async def file(self, tenant: str, file_id: str) -> FileObject:
        """Raises ``NotFound``."""
        return await self._record("file", tenant, file_id, FileObject)

    async def files(self, tenant: str) -> list[FileObject]:
        """The newest first."""
        return await self._records("file", tenant, FileObject)

    def content(self, tenant: str, file_id: str) -> AsyncIterator[bytes]:
        """The file's bytes, in pieces. Raises ``BusError`` if it is gone."""
        return self._objects.read(f"{tenant}.{file_id}")

    async def lines(self, tenant: str, file_id: str) -> AsyncIterator[bytes]:
        """The file's lines, without what ends them. Raises ``TooLong``, ``BusError``."""
        held = bytearray()
        async for piece in self.content(tenant, file_id):
            held += piece
            *whole, rest = held.split(b"\n")
            for line in whole:
                yield bytes(line)
            held = bytearray(rest)
            if len(held) > LINE_MAX_BYTES:
                raise TooLong
        if held:
            yield bytes(held)

    async def remove_file(self, tenant: str, file_id: str) -> None:
        """Raises ``NotFound``."""
        await self.file(tenant, file_id)
        await self.keys.remove(f"file.{tenant}.{file_id}")
        await self._objects.remove(f"{tenant}.{file_id}")

    # -- batches -----------------------------------------------------------------------------------------------------

    async def add_batch(self, tenant: str, batch: Batch) -> None:
        """From here on some gateway runs it."""
        await self.keys.put(f"batch.{tenant}.{batch.id}", msgspec.json.encode(batch))
        await self.keys.put(lease_key(tenant, batch.id), b"")

    async def batch(self, tenant: str, batch_id: str) -> Batch:
        """Raises ``NotFound``."""
        return await self._record("batch", tenant, batch_id, Batch)

    async def batches(self, tenant: str) -> list[Batch]:
        """The newest first."""
        return await self._records("batch", tenant, Batch)

    async def change(self, tenant: str, batch_id: str, move: Callable[[Batch], Batch]) -> Batch:
        """``move`` the batch from what it is to what it becomes, whoever else changes it meanwhile.

        Raises ``NotFound``.
        """
        key = f"batch.{tenant}.{batch_id}"
        while True:
            entry = await self.keys.get(key)
            if entry is None:
                raise NotFound
            before = msgspec.json.decode(entry.value, type=Batch)
            after = move(before)
            if after == before:
                return after
            if await self.keys.update(key, msgspec.json.encode(after), entry.revision) is not None:
                return after

    async def unfinished(self) -> dict[tuple[str, str], Entry]:
        """(tenant, batch) -> lease, of the batches that have not ended."""
        found = {}
        for key in await self.keys.keys("lease"):
            entry = await self.keys.get(key)
            if entry is not None:
                _, tenant, batch_id = key.split(".")
                found[tenant, batch_id] = entry
        return found

    # -- results of lines --------------------------------------------------------------------------------------------

    async def add_line(self, tenant: str, batch_id: str, number: int, result: LineResult[msgspec.Raw]) -> bool:
        """Keep the result of a line unless there is one; whether it is ours that stands."""
        subject = self._subjects.line(tenant, batch_id, number)
        return await self._create(self._subjects.line_stream, subject, msgspec.json.encode(result))

    async def line(self, tenant: str, batch_id: str, number: int) -> LineResult[msgspec.Raw] | None:
        subject = self._subjects.line(tenant, batch_id, number)
        found = await self._api.get_last(self._subjects.line_stream, subject)
        return None if found is None else msgspec.json.decode(found.data, type=LineResult[msgspec.Raw])

    async def lines_done(self, tenant: str, batch_id: str) -> set[int]:
        subjects = await self._api.subjects(self._subjects.line_stream, self._subjects.lines(tenant, batch_id))
        return {int(subject.rpartition(".")[2]) for subject in subjects}

    async def forget_lines(self, tenant: str, batch_id: str) -> None:
        await self._api.purge(self._subjects.line_stream, self._subjects.lines(tenant, batch_id))

    # -- results for publishers --------------------------------------------------------------------------------------

    async def add_published(self, tenant: str, message_id: str, data: bytes) -> bool:
        """Keep the result of a published request unless there is one; whether it is ours that stands."""
        return await self._create(self._subjects.published_stream, self._subjects.published(tenant, message_id), data)

    async def published(self, tenant: str, message_id: str) -> bytes | None:
        subject = self._subjects.published(tenant, message_id)
        found = await self._api.get_last(self._subjects.published_stream, subject)
        return None if found is None else found.data

    async def _create(self, stream: str, subject: str, data: bytes) -> bool:
        try:
            await self._api.publish(subject, data, {"Nats-Expected-Last-Subject-Sequence": "0"})
            return True
        except ApiError as error:
            if error.failure.err_code != WRONG_LAST_SEQUENCE:
                raise
        standing = await self._api.get_last(stream, subject)
        return standing is not None and standing.data == data

    async def _record(self, kind: str, tenant: str, name: str, record: type[T]) -> T:
        # A name from a URL must not reach other keys.
        entry = await self.keys.get(f"{kind}.{tenant}.{name}") if _is_id(name) else None
        if entry is None:
            raise NotFound
        return msgspec.json.decode(entry.value, type=record)

    async def _records(self, kind: str, tenant: str, record: type[T]) -> list[T]:
        entries = [await self.keys.get(key) for key in await self.keys.keys(f"{kind}.{tenant}")]
        found = [msgspec.json.decode(entry.value, type=record) for entry in entries if entry is not None]
        return sorted(found, key=lambda item: (-item.created_at, item.id))


def lease_key(tenant: str, batch_id: str) -> str:
    return f"lease.{tenant}.{batch_id}"


def new_batch(input_file_id: str, endpoint: str, window: str, metadata: dict[str, str] | None) -> Batch:
    now = math.floor(time.time())
    return Batch(
        id=f"batch_{uuid.uuid4().hex}",
        endpoint=endpoint,
        input_file_id=input_file_id,
        completion_window=window,
        created_at=now,
        expires_at=now + WINDOW_S,
        metadata=metadata,
    )


def file_of(batch_id: str, kind: str) -> str:
    """Id of a batch's output or error file: the same whoever writes it, so that it is written over, not twice."""
    return f"file-{hashlib.sha256(f'{batch_id}.{kind}'.encode()).hexdigest()[:32]}"


def _is_id(name: str) -> bool:
    return name.replace("-", "").replace("_", "").isalnum() and name.isascii()


__all__ = ["BatchStore", "BusError", "NotFound", "TooLong", "file_of", "lease_key", "new_batch"]
