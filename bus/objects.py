"""An object store on JetStream, laid out as the stock tools do it (ADR-20), read and written piece by piece.

Each piece is read by one direct get, so a restart of the server between two of them does no harm.
"""

from __future__ import annotations

import base64
import hashlib
import time
import uuid
from collections.abc import AsyncIterable, AsyncIterator
from datetime import UTC, datetime

import msgspec

from llmserve.bus.base import BusError
from llmserve.bus.jetstream import JetStream

PIECE_BYTES = 128 << 10


class _Options(msgspec.Struct, frozen=True):
    max_chunk_size: int = PIECE_BYTES


class ObjectInfo(msgspec.Struct, frozen=True):
    """What is known of an object; the fields of ADR-20."""

    name: str
    bucket: str
    nuid: str
    """Names the pieces."""
    size: int
    """Bytes."""
    chunks: int
    digest: str
    mtime: str
    options: _Options = _Options()


class ObjectStore:
    """Every operation raises ``BusUnavailable`` when patience ends."""

    def __init__(self, api: JetStream, bucket: str) -> None:
        self._api = api
        self._bucket = bucket
        self._stream = f"OBJ_{bucket}"

    async def put(self, name: str, pieces: AsyncIterable[bytes]) -> ObjectInfo:
        """Store the object in the place of one of that name; it appears complete or not at all."""
        old = await self.info(name)
        nuid, size, count, digest = uuid.uuid4().hex, 0, 0, hashlib.sha256()
        try:
            async for piece in _cut(pieces):
                # The id makes a repetition harmless, where the answer to a first try was lost.
                await self._api.publish(self._pieces(nuid), piece, {"Nats-Msg-Id": f"{nuid}.{count}"})
                digest.update(piece)
                size, count = size + len(piece), count + 1
        except BaseException:
            await self._api.purge(self._stream, self._pieces(nuid))
            raise
        encoded = "SHA-256=" + base64.urlsafe_b64encode(digest.digest()).decode()
        now = datetime.fromtimestamp(time.time(), UTC).isoformat().replace("+00:00", "Z")
        info = ObjectInfo(name, self._bucket, nuid, size, count, encoded, now)
        await self._api.publish(self._meta(name), msgspec.json.encode(info), {"Nats-Rollup": "sub"})
        if old is not None:
            await self._api.purge(self._stream, self._pieces(old.nuid))
        return info

    async def info(self, name: str) -> ObjectInfo | None:
        found = await self._api.get_last(self._stream, self._meta(name))
        return None if found is None else msgspec.json.decode(found.data, type=ObjectInfo)

    async def read(self, name: str) -> AsyncIterator[bytes]:
        """The object's pieces. Raises ``BusError`` if there is none, or what is there is not what was stored."""
        info = await self.info(name)
        if info is None:
            raise BusError(f"there is no object {name}")
        seq, size, digest = 1, 0, hashlib.sha256()
        for _ in range(info.chunks):
            piece = await self._api.next_of(self._stream, self._pieces(info.nuid), seq)
            if piece is None:
                raise BusError(f"object {name} is incomplete")
            seq, size = piece.seq + 1, size + len(piece.data)
            digest.update(piece.data)
            yield piece.data
        if info.digest != "SHA-256=" + base64.urlsafe_b64encode(digest.digest()).decode():
            raise BusError(f"object {name} is damaged")

    async def remove(self, name: str) -> None:
        info = await self.info(name)
        if info is not None:
            await self._api.purge(self._stream, self._meta(name))
            await self._api.purge(self._stream, self._pieces(info.nuid))

    def _meta(self, name: str) -> str:
        return f"$O.{self._bucket}.M.{base64.urlsafe_b64encode(name.encode()).decode()}"

    def _pieces(self, nuid: str) -> str:
        return f"$O.{self._bucket}.C.{nuid}"


async def _cut(pieces: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    held = bytearray()
    async for piece in pieces:
        held += piece
        while len(held) >= PIECE_BYTES:
            yield bytes(held[:PIECE_BYTES])
            del held[:PIECE_BYTES]
    if held:
        yield bytes(held)
