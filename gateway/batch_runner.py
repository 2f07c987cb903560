"""Runs batches. Each has a lease that its gateway renews; a batch whose lease is not renewed goes to another gateway.

The result of a line is kept once, by whoever is first: a gateway that lost its lease unawares changes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass

import msgspec

from llmserve.bus.base import BusError
from llmserve.bus.keyvalue import Entry
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
from llmserve.gateway.batch_store import BatchStore, NotFound, TooLong, file_of, lease_key
from llmserve.gateway.executor import Executor, new_request_id
from llmserve.gateway.metrics import GatewayMetrics

log = logging.getLogger(__name__)

LOOK_S = 1.0
RENEW_S = 2.0
LOST_AFTER_S = 7.0
"""A lease that is not renewed for so long is another gateway's for the taking."""
AT_ONCE = 8
"""Batches that one gateway runs at once."""
_EXPIRED = LineError("batch_expired", "This request could not be executed before the completion window expired.")


class _LeaseLost(Exception):
    """Another gateway has the batch."""


@dataclass(slots=True)
class _Seen:
    revision: int
    since_s: float


class BatchRunner:
    """Takes and runs batches between ``start`` and ``stop``."""

    def __init__(
        self, store: BatchStore, executor: Executor, member_id: str, metrics: GatewayMetrics, concurrency: int
    ) -> None:
        self._store = store
        self._executor = executor
        self._member_id = member_id
        self._metrics = metrics
        self._concurrency = concurrency
        self._running: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._seen: dict[tuple[str, str], _Seen] = {}
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._look_forever())

    async def stop(self) -> None:
        """Leave what runs to another gateway."""
        tasks = [*self._running.values(), *([self._task] if self._task is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def look(self) -> None:
        """There may be a new batch, or one that is cancelled."""
        self._wake.set()

    async def _look_forever(self) -> None:
        while True:
            self._wake.clear()
            try:
                await self._look()
            except BusError as error:
                log.warning("batches cannot be looked up: %s", error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._wake.wait()

    async def _look(self) -> None:
        now = time.monotonic()
        unfinished = await self._store.unfinished()
        self._seen = {key: seen for key, seen in self._seen.items() if key in unfinished}
        for key, lease in unfinished.items():
            if key in self._running or len(self._running) >= AT_ONCE:
                continue
            seen = self._seen.get(key)
            if seen is None or seen.revision != lease.revision:
                seen = self._seen[key] = _Seen(lease.revision, now)
            if not lease.value or now - seen.since_s > LOST_AFTER_S:
                await self._take(*key, lease)

    async def _take(self, tenant: str, batch_id: str, lease: Entry) -> None:
        mine = f"{self._member_id} {uuid.uuid4().hex}".encode()
        revision = await self._store.keys.update(lease_key(tenant, batch_id), mine, lease.revision)
        if revision is None:
            return
        if lease.value:
            log.warning("batch %s is taken over", batch_id, extra={"tenant": tenant})
            self._metrics.batch_takeovers.inc()
        task = asyncio.create_task(self._hold(tenant, batch_id, revision))
        self._running[tenant, batch_id] = task
        task.add_done_callback(lambda _: self._running.pop((tenant, batch_id), None))

    async def _hold(self, tenant: str, batch_id: str, revision: int) -> None:
        """Run the batch while the lease is ours, then give the lease up."""
        lease = _Lease(self._store, tenant, batch_id, self._member_id, revision)
        working = asyncio.create_task(self._run(tenant, batch_id))
        holding = asyncio.create_task(lease.renew_forever())
        ended = False
        try:
            await asyncio.wait((working, holding), return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
                ended = True
            else:
                holding.result()
        except _LeaseLost:
            log.warning("batch %s has gone to another gateway", batch_id, extra={"tenant": tenant})
        except NotFound:
            ended = True
        except (BusError, TooLong) as error:
            log.warning("batch %s is left for later: %r", batch_id, error, extra={"tenant": tenant})
        except Exception:
            log.exception("batch %s failed, it will be tried again", batch_id, extra={"tenant": tenant})
            await asyncio.sleep(LOOK_S)
        finally:
            for task in (working, holding):
                task.cancel()
            await asyncio.gather(working, holding, return_exceptions=True)
            # Even while this task is cancelled, so that another gateway need not wait.
            with contextlib.suppress(BusError, TimeoutError):
                async with asyncio.timeout(3):
                    await (lease.end() if ended else lease.release())

    # -- one batch ---------------------------------------------------------------------------------------------------

    async def _run(self, tenant: str, batch_id: str) -> None:
        batch = await self._store.batch(tenant, batch_id)
        if batch.ended:
            return
        log.info("batch %s: %s", batch_id, batch.status, extra={"tenant": tenant})
        total, errors = await self._validate(tenant, batch)
        if errors:
            await self._store.change(tenant, batch_id, lambda known: rejected(known, errors, time.time()))
            return
        batch = await self._store.change(tenant, batch_id, lambda known: begun(known, total, time.time()))
        progress = await self._progress(tenant, batch)
        expired = False
        if batch.status is Status.IN_PROGRESS:
            expired = await self._run_lines(tenant, batch, progress)
        await self._store.change(tenant, batch_id, lambda known: finalizing(known, time.time()))
        await self._finish(tenant, batch, total, expired=expired)

    async def _validate(self, tenant: str, batch: Batch) -> tuple[int, list[BatchError]]:
        """(lines, what is wrong)."""
        total, ids, errors = 0, set[str](), list[BatchError]()
        try:
            async for number, text in self._numbered(tenant, batch):
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
            if await self._missing(tenant, batch):
                return 0, [BatchError("invalid_file", f"The input file cannot be read: {error}")]
            raise
        if total > MAX_LINES:
            errors.append(BatchError("too_many_requests", f"A batch has at most {MAX_LINES} requests."))
        if not total:
            errors.append(BatchError("empty_file", "The input file has no request."))
        return total, errors

    async def _missing(self, tenant: str, batch: Batch) -> bool:
        try:
            await self._store.file(tenant, batch.input_file_id)
        except NotFound:
            return True
        return False

    async def _progress(self, tenant: str, batch: Batch) -> _Progress:
        """What an earlier gateway has got done."""
        progress = _Progress(await self._store.lines_done(tenant, batch.id))
        for number in progress.done:
            result = await self._store.line(tenant, batch.id, number)
            if result is not None:
                progress.count(result)
        return progress

    async def _run_lines(self, tenant: str, batch: Batch, progress: _Progress) -> bool:
        """Run what is not done; whether the window ended before all was."""
        running = asyncio.create_task(self._run_all(tenant, batch, progress))
        watching = asyncio.create_task(self._watch(tenant, batch, progress))
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
            await self._tell(tenant, batch, progress)

    async def _run_all(self, tenant: str, batch: Batch, progress: _Progress) -> None:
        slots = asyncio.Semaphore(self._concurrency)
        async with asyncio.TaskGroup() as lines:
            async for number, text in self._numbered(tenant, batch):
                if number in progress.done:
                    continue
                await slots.acquire()
                line = parse_line(text, batch.endpoint)
                task = lines.create_task(self._run_line(tenant, batch, number, line, progress))
                task.add_done_callback(lambda _: slots.release())

    async def _run_line(self, tenant: str, batch: Batch, number: int, line: Line, progress: _Progress) -> None:
        request_id = new_request_id()
        outcome = await self._executor.run(tenant, line.url, bytes(line.body), request_id)
        response = LineResponse(outcome.status, request_id, msgspec.Raw(outcome.body))
        result = LineResult(f"batch_req_{uuid.uuid4().hex}", line.custom_id, response)
        if await self._store.add_line(tenant, batch.id, number, result):
            progress.count(result)

    async def _watch(self, tenant: str, batch: Batch, progress: _Progress) -> None:
        """Tell the progress; return when the batch is cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            known = await self._tell(tenant, batch, progress)
            if known.status is not Status.IN_PROGRESS:
                return

    async def _tell(self, tenant: str, batch: Batch, progress: _Progress) -> Batch:
        completed, failed = progress.completed, progress.failed
        return await self._store.change(tenant, batch.id, lambda known: counted(known, completed, failed))

    async def _finish(self, tenant: str, batch: Batch, total: int, *, expired: bool) -> None:
        """Write the files, then say so."""
        output = await self._write(tenant, batch, "output", total, succeeded=True, missing=False)
        errors = await self._write(tenant, batch, "error", total, succeeded=False, missing=expired)
        done = await self._store.change(
            tenant, batch.id, lambda known: finished(known, output, errors, time.time(), expired=expired)
        )
        await self._store.forget_lines(tenant, batch.id)
        self._metrics.batches.labels(tenant, done.status.value).inc()
        log.info("batch %s: %s", batch.id, done.status, extra={"tenant": tenant})

    async def _write(
        self, tenant: str, batch: Batch, kind: str, total: int, *, succeeded: bool, missing: bool
    ) -> str | None:
        """Id of the file of all results that did or did not succeed, None if there is none."""
        count = 0

        async def lines() -> AsyncIterator[bytes]:
            nonlocal count
            texts = self._numbered(tenant, batch) if missing else None
            for number in range(1, total + 1):
                result = await self._store.line(tenant, batch.id, number)
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
        await self._store.add_file(tenant, f"{batch.id}_{kind}.jsonl", "batch_output", lines(), file_id)
        if count:
            return file_id
        await self._store.remove_file(tenant, file_id)
        return None

    async def _numbered(self, tenant: str, batch: Batch) -> AsyncIterator[tuple[int, bytes]]:
        """The requests of the input file, numbered from 1; empty lines are none."""
        number = 0
        async for text in self._store.lines(tenant, batch.input_file_id):
            if text.strip():
                number += 1
                yield number, text


class _Progress:
    """Lines of one batch that have their result."""

    def __init__(self, done: set[int]) -> None:
        self.done = done
        self.completed = 0
        self.failed = 0

    def count(self, result: LineResult) -> None:
        if result.succeeded:
            self.completed += 1
        else:
            self.failed += 1


class _Lease:
    """The right to run one batch."""

    def __init__(self, store: BatchStore, tenant: str, batch_id: str, member_id: str, revision: int) -> None:
        self._keys = store.keys
        self._key = lease_key(tenant, batch_id)
        self._member_id = member_id
        self._revision = revision

    async def renew_forever(self) -> None:
        """Raises ``_LeaseLost``, also when the bus is away for so long that another may have it."""
        while True:
            await asyncio.sleep(RENEW_S)
            try:
                async with asyncio.timeout(LOST_AFTER_S - RENEW_S):
                    await self._renew(f"{self._member_id} {uuid.uuid4().hex}".encode())
            except (BusError, TimeoutError) as error:
                raise _LeaseLost from error

    async def release(self) -> None:
        """For another to take at once."""
        with contextlib.suppress(_LeaseLost):
            await self._renew(b"")

    async def end(self) -> None:
        """The batch has ended."""
        await self._keys.remove(self._key)

    async def _renew(self, value: bytes) -> None:
        revision = await self._keys.update(self._key, value, self._revision)
        if revision is None:
            raise _LeaseLost
        self._revision = revision
