"""Direct publishing: requests that tenants put on the bus themselves, run by whichever gateway takes them.

A request is a message on ``llm.<deployment>.submit.<tenant>`` in JSON or msgpack, its result one on
``llm.<deployment>.result.<tenant>.<id>`` in the same encoding. The tenant is read from the subject.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Callable, Iterable

import msgspec

from llmserve.bus.base import BusError
from llmserve.bus.connection import Connection
from llmserve.bus.jetstream import JetStream
from llmserve.bus.subjects import Subjects
from llmserve.bus.work import ACK_WAIT_S, Job, WorkTaker
from llmserve.gateway.batch_records import ENDPOINTS, LineError, LineResponse, LineResult
from llmserve.gateway.batch_store import BatchStore
from llmserve.gateway.executor import Executor, Outcome, new_request_id

log = logging.getLogger(__name__)

_ID = re.compile(r"[A-Za-z0-9_-]{1,128}\Z")
RESULT_MAX_BYTES = 7 << 20


class Submission(msgspec.Struct, frozen=True):
    """What a publisher sends: a line of a batch file, in which only the body is required."""

    body: dict[str, object]
    url: str = "/v1/chat/completions"
    method: str = "POST"
    custom_id: str | None = None


class Submissions:
    """Takes the tenants' messages between ``start`` and ``stop``."""

    def __init__(
        self,
        connection: Connection,
        api: JetStream,
        subjects: Subjects,
        store: BatchStore,
        executor: Executor,
        concurrency: int,
    ) -> None:
        self._connection = connection
        self._api = api
        self._subjects = subjects
        self._store = store
        self._executor = executor
        self._concurrency = concurrency
        self._takers: dict[str, WorkTaker] = {}
        self._running: set[asyncio.Task[None]] = set()

    async def start(self, tenants: Iterable[str]) -> None:
        """Take the messages of these tenants, whose streams are there. Raises ``BusError``."""
        for tenant in tenants:
            if tenant not in self._takers:
                stream = self._subjects.submit_stream(tenant)
                taker = WorkTaker(self._connection, self._api, stream, self._concurrency, self._handler(tenant))
                self._takers[tenant] = taker
                try:
                    await taker.start()
                except BaseException:
                    del self._takers[tenant]  # for the next call
                    raise

    async def stop(self) -> None:
        """Give back what runs."""
        for taker in self._takers.values():
            await taker.stop()
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    def _handler(self, tenant: str) -> Callable[[Job], None]:
        def handle(job: Job) -> None:
            task = asyncio.create_task(self._work(tenant, job))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

        return handle

    async def _work(self, tenant: str, job: Job) -> None:
        saying = asyncio.create_task(_say_working(job))
        try:
            await self._run(tenant, job)
        except BusError as error:
            log.warning("a published request is left for later: %s", error, extra={"tenant": tenant})
            await job.give_back(1.0)
        except asyncio.CancelledError:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await job.give_back()
            raise
        except Exception:
            log.exception("a published request failed and is tried again", extra={"tenant": tenant})
            await job.give_back(5.0)
        finally:
            saying.cancel()
            self._takers[tenant].free()

    async def _run(self, tenant: str, job: Job) -> None:
        message_id = job.headers.get("Nats-Msg-Id", "")
        if not _ID.match(message_id):
            # Publishers know it from the acknowledgement.
            message_id = str(job.seq)
        # Delivered again, or published again after the time in which the stream itself knows it.
        if await self._store.published(tenant, message_id) is None:
            packed = is_msgpack(job.data, job.headers.get("Content-Type", ""))
            result = await self._result(tenant, message_id, job.data, packed=packed)
            data = msgspec.msgpack.encode(result) if packed else msgspec.json.encode(result)
            if len(data) > RESULT_MAX_BYTES:
                error = LineError("result_too_large", f"The result has {len(data)} bytes")
                result = LineResult(message_id, result.custom_id, error=error)
                data = msgspec.msgpack.encode(result) if packed else msgspec.json.encode(result)
            await self._store.add_published(tenant, message_id, data)
        await job.done()

    async def _result(self, tenant: str, message_id: str, data: bytes, *, packed: bool) -> LineResult[object]:
        decode = msgspec.msgpack.decode if packed else msgspec.json.decode
        try:
            submission = decode(data, type=Submission)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            return LineResult(message_id, None, error=LineError("invalid_request", str(error)))
        if submission.method != "POST" or submission.url not in ENDPOINTS:
            text = f"{submission.method} {submission.url}: must be POST and one of {', '.join(ENDPOINTS)}"
            return LineResult(message_id, submission.custom_id, error=LineError("invalid_url", text))
        request_id = new_request_id()
        body = msgspec.json.encode(submission.body)
        outcome: Outcome = await self._executor.run(tenant, submission.url, body, request_id)
        answer = msgspec.json.decode(outcome.body)
        response = LineResponse(outcome.status, request_id, answer)
        return LineResult(message_id, submission.custom_id, response)


def is_msgpack(data: bytes, content_type: str) -> bool:
    """By the header, else by the first byte: a JSON object begins with a brace or a space."""
    if content_type:
        return "msgpack" in content_type
    return bool(data) and data[0] >= 0x80


async def _say_working(job: Job) -> None:
    while True:
        await asyncio.sleep(ACK_WAIT_S / 4)
        await job.working()
