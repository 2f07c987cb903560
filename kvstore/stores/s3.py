"""Pages as objects of an S3 bucket, or of any server that speaks its protocol.

Retries with jittered exponential backoff and the decision what is worth one are botocore's (mode ``standard``);
large pages go in parts. Each call has a deadline over all its tries and over its wait for a connection, so that a
server that hangs costs no more than one that is down. An object's time of last use is its ``LastModified``, renewed
by copying it onto itself; on the few servers that keep the time then (s3rver), pages age from their writing, or from
their last use that a manager saw.
"""

from __future__ import annotations

import asyncio
import io
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from itertools import islice
from typing import Any, TypeVar

import aioboto3
import aiohttp
from aiobotocore.config import AioConfig
from boto3.s3.transfer import TransferConfig
from botocore.exceptions import BotoCoreError, ClientError
from botocore.parsers import ResponseParserError

from llmserve.kvstore.stores.base import PageStore, Stored, StoreError

logger = logging.getLogger("vllm.llmserve.tiers")
"""Below ``vllm``, whose logger is the one that engine processes configure."""

T = TypeVar("T")

_PARALLEL = 16
"""Requests under way at once."""
_AHEAD = 2 * _PARALLEL
"""Of a prefix so many pages are asked for before the first of them is known: a slow answer holds up no others."""
_DELETE_BATCH = 1000
_MISSING = ("404", "NoSuchKey", "NotFound")
_TRIES = 3
PART_BYTES = 16 * 2**20
"""Larger pages are written in parts of this size."""


_FAILURES = (BotoCoreError, ResponseParserError, aiohttp.ClientError, OSError, ValueError)
"""What servers and networks make the libraries raise: aiohttp's of a body that is cut, the parser's of a proxy's page
in place of an answer."""


class S3Store(PageStore):
    """One bucket. Credentials come from where boto3 looks for them (environment, files, instance role)."""

    shared = True

    def __init__(
        self,
        name: str,
        bucket: str,
        *,
        region: str | None = None,
        endpoint_url: str | None = None,
        prefix: str = "",
        timeout_s: float = 10.0,
        part_bytes: int = PART_BYTES,
        list_batch: int = 1000,
    ) -> None:
        self.name = name
        self._bucket = bucket
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._timeout_s = timeout_s
        self._part_bytes = part_bytes
        self._list_batch = list_batch
        self._options: dict[str, Any] = {
            "region_name": region,
            "endpoint_url": endpoint_url,
            "config": AioConfig(
                connect_timeout=min(3.0, timeout_s),
                read_timeout=timeout_s,
                max_pool_connections=_PARALLEL,
                retries={"mode": "standard", "total_max_attempts": _TRIES},
                # Pages carry their own checksum, and not every server understands these.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                s3={"addressing_style": "path"} if endpoint_url else None,
            ),
        }
        self._open = AsyncExitStack()
        self._client: Any = None
        self._opening = asyncio.Lock()
        self._slots = asyncio.Semaphore(_PARALLEL)

    async def read(self, path: str) -> bytes | None:
        return await self._get(path)

    async def head(self, path: str, size_bytes: int) -> bytes | None:
        return await self._get(path, Range=f"bytes=0-{size_bytes - 1}")

    async def _get(self, path: str, **part: str) -> bytes | None:
        async def call(client: Any) -> bytes | None:
            try:
                response = await client.get_object(Bucket=self._bucket, Key=self._key(path), **part)
            except ClientError as error:
                if _missing(error):
                    return None
                raise
            async with response["Body"] as body:
                data: bytes = await body.read()
            return data

        return await self._call(call)

    async def write(self, path: str, data: bytes) -> None:
        async def call(client: Any) -> None:
            if len(data) <= self._part_bytes:
                await client.put_object(Bucket=self._bucket, Key=self._key(path), Body=data)
                return
            parts = TransferConfig(
                multipart_threshold=self._part_bytes, multipart_chunksize=self._part_bytes, max_concurrency=4
            )
            await client.upload_fileobj(io.BytesIO(data), self._bucket, self._key(path), Config=parts)

        await self._call(call)

    async def contains(self, paths: Sequence[str]) -> int:
        return await self._count(paths, None)

    async def contains_within(self, paths: Sequence[str], within_s: float) -> int:
        return await self._count(paths, within_s)

    async def _count(self, paths: Sequence[str], within_s: float | None) -> int:
        rest = iter(paths)
        asked: deque[asyncio.Task[bool]] = deque()
        count = 0
        try:
            async with asyncio.timeout(within_s):
                while True:
                    asked.extend(asyncio.create_task(self._has(path)) for path in islice(rest, _AHEAD - len(asked)))
                    if not asked or not await asked[0]:
                        return count
                    asked.popleft()
                    count += 1
        except TimeoutError as error:
            if not count and within_s is not None:
                raise self._silent(paths, within_s) from error
            return count
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    async def _has(self, path: str) -> bool:
        async def call(client: Any) -> bool:
            try:
                await client.head_object(Bucket=self._bucket, Key=self._key(path))
            except ClientError as error:
                if _missing(error):
                    return False
                raise
            return True

        return await self._call(call)

    async def delete(self, paths: Sequence[str]) -> None:
        for start in range(0, len(paths), _DELETE_BATCH):
            keys = [{"Key": self._key(path)} for path in paths[start : start + _DELETE_BATCH]]

            async def call(client: Any, keys: list[dict[str, str]] = keys) -> None:
                answer = await client.delete_objects(Bucket=self._bucket, Delete={"Objects": keys, "Quiet": True})
                if errors := answer.get("Errors"):
                    raise StoreError(f"{self.name}: {len(errors)} objects stay: {errors[0].get('Code')}")

            await self._call(call)

    async def touch(self, paths: Sequence[str]) -> None:
        rest = iter(paths)

        async def some() -> None:
            for path in rest:
                await self._touch(path)

        # No more at a time than there are connections: the wait for one counts.
        try:
            async with asyncio.TaskGroup() as group:
                for _ in paths[:_PARALLEL]:
                    group.create_task(some())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from errors

    async def _touch(self, path: str) -> None:
        async def call(client: Any) -> None:
            key = self._key(path)
            source = {"Bucket": self._bucket, "Key": key}
            try:
                await client.copy_object(
                    Bucket=self._bucket, Key=key, CopySource=source, MetadataDirective="REPLACE", Metadata={}
                )
            except ClientError as error:
                if not _missing(error):
                    raise

        await self._call(call)

    async def listing(self, prefix: str) -> AsyncIterator[list[Stored]]:
        after = ""
        while True:
            arguments = {"StartAfter": after} if after else {}

            async def call(client: Any, arguments: dict[str, str] = arguments) -> dict[str, Any]:
                answer: dict[str, Any] = await client.list_objects_v2(
                    Bucket=self._bucket, Prefix=self._prefix + prefix, MaxKeys=self._list_batch, **arguments
                )
                return answer

            answer = await self._call(call)
            found = answer.get("Contents", [])
            if found:
                yield [
                    Stored(item["Key"][len(self._prefix) :], item["Size"], item["LastModified"].timestamp())
                    for item in found
                ]
            if not answer.get("IsTruncated") or not found:
                return
            after = found[-1]["Key"]

    async def close(self) -> None:
        self._client = None
        await self._open.aclose()

    def _key(self, path: str) -> str:
        return self._prefix + path

    async def _call(self, call: Callable[[Any], Awaitable[T]]) -> T:
        try:
            async with asyncio.timeout(self._timeout_s), self._slots:
                return await call(await self._opened())
        except StoreError:
            raise
        except asyncio.CancelledError as error:
            # If nobody cancelled it, it is aiohttp's own: a server may answer before all of an object was sent.
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise StoreError(f"{self.name}: the request was cut short") from error
        except TimeoutError as error:
            raise StoreError(f"{self.name}: no answer within {self._timeout_s:g} s") from error
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code") or "unknown"
            raise StoreError(f"{self.name}: {code}") from error
        except _FAILURES as error:
            raise StoreError(f"{self.name}: {_text(error)}") from error
        except Exception as error:
            logger.exception("bucket %s of %s failed in a way of its own", self._bucket, self.name)
            raise StoreError(f"{self.name}: {_text(error)}") from error

    async def _opened(self) -> Any:
        async with self._opening:
            if self._client is None:
                session = aioboto3.Session()
                self._client = await self._open.enter_async_context(session.client("s3", **self._options))
        return self._client


def _missing(error: ClientError) -> bool:
    return error.response.get("Error", {}).get("Code") in _MISSING


def _text(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
