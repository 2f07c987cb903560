"""A client for those who publish requests themselves: it needs a NATS address and a tenant's seed, nothing of ours.

The subjects and bodies are those of ``docs/batch.md``: whatever speaks NATS can do the same.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, TypeAlias

import nats
import nats.errors

from llmserve.bus.base import BusError, BusUnavailable, QueueFull
from llmserve.bus.subjects import Subjects, is_token

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg

Json: TypeAlias = dict[str, object]

_QUEUE_FULL = 10077
_LOOK_AGAIN_S = 2.0
_TRY_S = 2.0


class Publisher:
    """Requests of one tenant and their results. Use it as an async context manager, or ``open`` and ``close`` it."""

    def __init__(
        self,
        url: str,
        deployment: str,
        tenant: str,
        *,
        seed: str | None = None,
        credentials: str | None = None,
        patience_s: float = 30.0,
    ) -> None:
        """``seed`` is what ``llmserve tenant add`` printed; ``credentials`` is ``user:password`` or a token.

        ``patience_s`` is how long a server that is away is waited for.
        """
        if not is_token(tenant):
            raise ValueError(f"tenant {tenant!r} is not one of letters, digits, '_' and '-'")
        self._url = url
        self._subjects = Subjects(deployment)
        self._tenant = tenant
        self._seed = seed
        self._credentials = credentials
        self._patience_s = patience_s
        self._client: Client | None = None
        self._waiting: dict[str, asyncio.Future[Json]] = {}

    async def __aenter__(self) -> Publisher:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def open(self) -> None:
        """Connect. Raises ``BusError``."""
        user, separator, password = (self._credentials or "").partition(":")
        login = {"user": user, "password": password} if separator else {"token": self._credentials}
        if self._seed is not None:
            login = {"nkeys_seed_str": self._seed}
        try:
            async with asyncio.timeout(self._patience_s):
                self._client = await nats.connect(
                    self._url.split(","),
                    name=f"publisher of {self._tenant}",
                    allow_reconnect=True,
                    max_reconnect_attempts=-1,
                    reconnect_time_wait=0.2,
                    error_cb=_ignore,
                    **login,
                )
        except (OSError, nats.errors.Error, TimeoutError, ValueError) as error:
            raise BusError(f"no bus for tenant {self._tenant}: {error or type(error).__name__}") from error
        await self._client.subscribe(self._subjects.published(self._tenant, ">"), cb=self._receive)
        await self._client.flush()

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()

    async def submit(
        self,
        body: Mapping[str, object],
        *,
        url: str = "/v1/chat/completions",
        message_id: str | None = None,
        custom_id: str | None = None,
    ) -> str:
        """Publish a request, durably when this returns; its id. The same id again, within a day, is the same request.

        Raises ``QueueFull``, ``BusUnavailable``, ``BusError``.
        """
        message_id = message_id or uuid.uuid4().hex
        data = json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body}).encode()
        answer = await self._ask(self._subjects.submit(self._tenant), data, {"Nats-Msg-Id": message_id})
        acknowledgement = json.loads(answer.data)
        if error := acknowledgement.get("error"):
            text = f"the request was not taken: {error.get('description')}"
            raise QueueFull(text) if error.get("err_code") == _QUEUE_FULL else BusError(text)
        return message_id

    async def result(self, message_id: str, timeout_s: float | None = None) -> Json:
        """The result of a request, whoever published it: ``{"id", "custom_id", "response", "error"}``.

        Raises ``TimeoutError``, ``BusUnavailable``.
        """
        future = self._waiting.setdefault(message_id, asyncio.get_running_loop().create_future())
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    # It may have come before we listened, or while the connection was lost.
                    found = await self._stored(message_id)
                    if found is not None:
                        return found
                    done, _ = await asyncio.wait((future,), timeout=_LOOK_AGAIN_S)
                    if done:
                        return future.result()
        finally:
            self._waiting.pop(message_id, None)

    async def run(self, requests: Iterable[Mapping[str, object]], at_once: int = 256) -> AsyncIterator[Json]:
        """Results as they come of lines of a batch file, each with an ``id`` beside the batch's own fields."""
        pending: set[asyncio.Task[Json]] = set()
        for request in requests:
            while len(pending) >= at_once:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    yield task.result()
            pending.add(asyncio.create_task(self._one(request)))
        for last in asyncio.as_completed(pending):
            yield await last

    async def _one(self, request: Mapping[str, object]) -> Json:
        body = request.get("body")
        if not isinstance(body, Mapping):
            raise ValueError("a request without a body")
        while True:
            try:
                message_id = await self.submit(
                    body,
                    url=str(request.get("url", "/v1/chat/completions")),
                    message_id=str(request["id"]) if "id" in request else None,
                    custom_id=str(request["custom_id"]) if "custom_id" in request else None,
                )
                break
            except QueueFull:
                await asyncio.sleep(1.0)
        return await self.result(message_id)

    async def _stored(self, message_id: str) -> Json | None:
        subject = self._subjects.published(self._tenant, message_id)
        answer = await self._ask(f"$JS.API.DIRECT.GET.{self._subjects.published_stream}.{subject}", b"", None)
        if (answer.headers or {}).get("Status"):
            return None
        found: Json = json.loads(answer.data)
        return found

    async def _ask(self, subject: str, data: bytes, headers: dict[str, str] | None) -> Msg:
        """Until there is an answer: what is asked for is the same however often it arrives."""
        if self._client is None:
            raise BusUnavailable("the client is not open")
        until = time.monotonic() + self._patience_s
        while True:
            try:
                return await self._client.request(subject, data, timeout=_TRY_S, headers=headers)
            except nats.errors.MaxPayloadError as error:
                raise BusError(f"the request has {len(data)} bytes, more than the server takes") from error
            except (nats.errors.Error, OSError, TimeoutError) as error:
                if time.monotonic() > until:
                    raise BusUnavailable(f"no answer on {subject}: {error or type(error).__name__}") from error
                await asyncio.sleep(0.2)

    async def _receive(self, message: Msg) -> None:
        future = self._waiting.get(message.subject.rpartition(".")[2])
        if future is not None and not future.done():
            try:
                future.set_result(json.loads(message.data))
            except ValueError:
                return  # in msgpack: another publisher's


async def _ignore(error: Exception) -> None:
    """nats-py reconnects; who waits asks again."""
