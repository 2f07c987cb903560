"""One batch, from the check of its file to its output files.

The result of a line is kept once, by whoever is first: a gateway that lost its lease unawares changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator

import msgspec

from llmserve.bus.base import BusError
from llmserve.gateway.batch_records import (
    MAX_ERRORS,
    MAX_LINES,
    Batch,
    BatchError,
    InvalidLine,
    Line,
    LineError,
    LineResponse,
    LineResult,
    Status,
    begun,
    counted,
    finalizing,
    finished,
    parse_line,
    rejected,
)
from llmserve.gateway.batch_store import BatchStore, NotFound, TooLong, file_of
from llmserve.gateway.executor import Executor, new_request_id
from llmserve.gateway.metrics import GatewayMetrics

log = logging.getLogger(__name__)

TELL_S = 1.0
_EXPIRED = LineError("batch_expired", "This request could not be executed before the completion window expired.")


class BatchRun:
    """``run`` it while its lease is held."""

    def __init__(
        self,
        store: BatchStore,
        executor: Executor,
        metrics: GatewayMetrics,
        concurrency: int,
        tenant: str,
        batch_id: str,
    ) -> None:
        """``concurrency``: lines at a time."""
        self._store = store
        self._executor = executor
        self._metrics = metrics
        self._concurrency = concurrency
        self._tenant = tenant
        self._batch_id = batch_id

    async def run(self) -> None:
        """Go on from wherever an earlier gateway has got. Raises ``NotFound``, ``TooLong``, ``BusError``."""
        batch = await self._store.batch(self._tenant, self._batch_id)
        if batch.ended:
            return
        log.info("batch %s: %s", self._batch_id, batch.status, extra={"tenant": self._tenant})
        total, errors = await self._validate(batch)
        if errors:
            batch = await self._store.change(
                self._tenant, self._batch_id, lambda known: rejected(known, errors, time.time())
            )
            self._ended(batch)
            return
        batch = await self._store.change(self._tenant, self._batch_id, lambda known: begun(known, total, time.time()))
        progress = await self._progress(batch)
        # An earlier gateway began to write the files: if lines were left out, the window had ended.
        expired = batch.status is Status.FINALIZING and len(progress.done) < total
        if batch.status is Status.IN_PROGRESS:
            expired = await self._run_lines(batch, progress)
        await self._store.change(self._tenant, self._batch_id, lambda known: finalizing(known, time.time()))
        await self._finish(batch, total, expired=expired)

    async def _validate(self, batch: Batch) -> tuple[int, list[BatchError]]:
        """(lines, what is wrong)."""
        total, ids, errors = 0, set[str](), list[BatchError]()
        try:
            async for number, text in self._numbered(batch):
                total += 1
                try:
                    line = parse_line(text, batch.endpoint)
                    if line.custom_id in ids:
                        raise InvalidLine("duplicate_custom_id", f"custom_id {line.custom_id!r} stands twice.")
                    ids.add(line.custom_id)
                except InvalidLine as wrong:
                    errors.append(BatchError(wrong.code, str(wrong), wrong.param, number))
                if len(errors) >= MAX_ERRORS or total > MAX_LINES:
                    break
        except TooLong:
            errors.append(BatchError("invalid_request", "A line is longer than 1 MB.", line=total + 1))
        except BusError as error:
            if await self._missing(batch):
                return 0, [BatchError("invalid_file", f"The input file cannot be read: {error}")]
            raise
        if total > MAX_LINES:
            errors.append(BatchError("too_many_requests", f"A batch has at most {MAX_LINES} requests."))
        if not total:
            errors.append(BatchError("empty_file", "The input file has no request."))
        return total, errors

    async def _missing(self, batch: Batch) -> bool:
        try:
            await self._store.file(self._tenant, batch.input_file_id)
        except NotFound:
            return True
        return False

    async def _progress(self, batch: Batch) -> _Progress:
        """What an earlier gateway has got done."""
        progress = _Progress(await self._store.lines_done(self._tenant, batch.id))
        for number in progress.done:
            result = await self._store.line(self._tenant, batch.id, number)
            if result is not None:
                progress.count(result)
        return progress

    async def _run_lines(self, batch: Batch, progress: _Progress) -> bool:
        """Run what is not done; whether the window ended before all was."""
        running = asyncio.create_task(self._run_all(batch, progress))
        watching = asyncio.create_task(self._watch(batch, progress))
        try:
            async with asyncio.timeout(max(0.0, batch.expires_at - time.time())):
                await asyncio.wait((running, watching), return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            return True
        else:
            for task in (running, watching):
                if task.done():
                    task.result()
            return False
        finally:
            for task in (running, watching):
                task.cancel()
            await asyncio.gather(running, watching, return_exceptions=True)
            await self._tell(batch, progress)

    async def _run_all(self, batch: Batch, progress: _Progress) -> None:
        slots = asyncio.Semaphore(self._concurrency)
        async with asyncio.TaskGroup() as lines:
            async for number, text in self._numbered(batch):
                if number in progress.done:
                    continue
                await slots.acquire()
                line = parse_line(text, batch.endpoint)
                task = lines.create_task(self._run_line(batch, number, line, progress))
                task.add_done_callback(lambda _: slots.release())

    async def _run_line(self, batch: Batch, number: int, line: Line, progress: _Progress) -> None:
        request_id = new_request_id()
        outcome = await self._executor.run(self._tenant, line.url, bytes(line.body), request_id)
        response = LineResponse(outcome.status, request_id, msgspec.Raw(outcome.body))
        result = LineResult(f"batch_req_{uuid.uuid4().hex}", line.custom_id, response)
        if await self._store.add_line(self._tenant, batch.id, number, result):
            progress.count(result)

    async def _watch(self, batch: Batch, progress: _Progress) -> None:
        """Tell the progress; return when the batch is cancelled."""
        while True:
            await asyncio.sleep(TELL_S)
            known = await self._tell(batch, progress)
            if known.status is not Status.IN_PROGRESS:
                return

    async def _tell(self, batch: Batch, progress: _Progress) -> Batch:
        completed, failed = progress.completed, progress.failed
        return await self._store.change(self._tenant, batch.id, lambda known: counted(known, completed, failed))

    async def _finish(self, batch: Batch, total: int, *, expired: bool) -> None:
        """Write the files, then say so."""
        output = await self._write(batch, "output", total, succeeded=True, missing=False)
        errors = await self._write(batch, "error", total, succeeded=False, missing=expired)
        done = await self._store.change(
            self._tenant, batch.id, lambda known: finished(known, output, errors, time.time(), expired=expired)
        )
        await self._store.forget_lines(self._tenant, batch.id)
        self._ended(done)

    def _ended(self, batch: Batch) -> None:
        self._metrics.batches.labels(self._tenant, batch.status.value).inc()
        log.info("batch %s: %s", batch.id, batch.status, extra={"tenant": self._tenant})

    async def _write(self, batch: Batch, kind: str, total: int, *, succeeded: bool, missing: bool) -> str | None:
        """Id of the file of all results that did or did not succeed, None if there is none."""
        count = 0

        async def lines() -> AsyncIterator[bytes]:
            nonlocal count
            texts = self._numbered(batch) if missing else None
            for number in range(1, total + 1):
                result = await self._store.line(self._tenant, batch.id, number)
                custom_id = None
                if texts is not None:
                    _, text = await anext(texts)
                    custom_id = parse_line(text, batch.endpoint).custom_id
                if result is None and missing:
                    result = LineResult(f"batch_req_{uuid.uuid4().hex}", custom_id, error=_EXPIRED)
                if result is not None and result.succeeded is succeeded:
                    count += 1
                    yield msgspec.json.encode(result) + b"\n"

        file_id = file_of(batch.id, kind)
        await self._store.add_file(self._tenant, f"{batch.id}_{kind}.jsonl", "batch_output", lines(), file_id)
        if count:
            return file_id
        await self._store.remove_file(self._tenant, file_id)
        return None

    async def _numbered(self, batch: Batch) -> AsyncIterator[tuple[int, bytes]]:
        """The requests of the input file, numbered from 1; empty lines are none."""
        number = 0
        async for text in self._store.lines(self._tenant, batch.input_file_id):
            if text.strip():
                number += 1
                yield number, text


class _Progress:
    """Lines of one batch that have their result."""

    def __init__(self, done: set[int]) -> None:
        self.done = done
        self.completed = 0
        self.failed = 0

    def count(self, result: LineResult[msgspec.Raw]) -> None:
        if result.succeeded:
            self.completed += 1
        else:
            self.failed += 1
