"""The gateway's end of the bus: open requests, their deltas, their attempts, their deadlines.

The decisions are in ``attempts``; this module carries them out.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine

from llmserve.bus.base import Bus, BusError, BusUnavailable, QueueFull, Subscription
from llmserve.bus.messages import AnyMessage, AttemptLost, Cancel, Delta, Deltas, Ping, Rejected, Request
from llmserve.bus.subjects import again
from llmserve.gateway.attempts import Action, Attempts, Deliver, Discard, Fail, Submit, Withdraw
from llmserve.gateway.block_size import BlockSize
from llmserve.gateway.call import Arrival, Call
from llmserve.gateway.codec import RequestCodec
from llmserve.gateway.endings import Endings
from llmserve.gateway.metrics import GatewayMetrics
from llmserve.gateway.watch import Watch

log = logging.getLogger(__name__)

_RETRY_S = 0.5
"""Between attempts to store a resubmission."""


class Channel:
    """Requests out, tokens in. ``on_arrivals`` gets what one bus message brought, ``on_failure`` each failed call."""

    def __init__(
        self,
        bus: Bus,
        member_id: str,
        api: str,
        metrics: GatewayMetrics,
        *,
        on_arrivals: Callable[[list[Arrival]], None],
        on_failure: Callable[[Call, Fail], None],
        deadline_s: float = 600.0,
        probe_after_s: float = 5.0,
    ) -> None:
        self._bus = bus
        self._member_id = member_id
        self._api = api
        self._metrics = metrics
        self._on_arrivals = on_arrivals
        self._on_failure = on_failure
        self.block_size = BlockSize()
        """Hears the heartbeats that its owner passes on."""
        self._epoch = 0
        """Of the newest router that was heard: what one before it still says is not to be believed."""
        self._calls: dict[str, Call] = {}
        self._by_local_id: dict[str, Call] = {}
        self._endings = Endings(bus, member_id)
        self._watch = Watch(bus, self._calls, self._carry_out, deadline_s, probe_after_s)
        self._tasks: set[asyncio.Task[object]] = set()
        self._subscription: Subscription | None = None

    async def start(self) -> None:
        """Listen for tokens and watch deadlines."""
        self._subscription = await self._bus.subscribe(self._bus.subjects.gateway(self._member_id), self._hear)
        self._watch.start()

    async def stop(self) -> None:
        """Cancel what is open and stop listening."""
        self.cancel(list(self._by_local_id))
        self._watch.stop()
        _, pending = await asyncio.wait(self._tasks, timeout=2.0) if self._tasks else (set(), set())
        for task in pending:
            task.cancel()
        if self._subscription is not None:
            await self._subscription.unsubscribe()

    def __len__(self) -> int:
        return len(self._calls)

    async def open(
        self,
        local_id: str,
        tenant: str,
        klass: str,
        codec: RequestCodec,
        received_s: float,
        on_end: Callable[[int], None] | None = None,
    ) -> None:
        """Accept a request durably; its tokens follow. Raises ``QueueFull`` or ``BusUnavailable``."""
        attempts = Attempts(codec.mode, codec.max_tokens)
        call = Call(local_id, tenant, klass, codec, attempts, self._metrics.of_tenant(tenant), received_s)
        call.on_end = on_end
        # Known before it is stored: its first tokens may overtake the acknowledgement.
        self._calls[call.request_id] = self._by_local_id[local_id] = call
        submit = call.attempts.start()
        try:
            seq = await self._store(call, submit)
        except asyncio.CancelledError:
            # A caller who is cancelled meanwhile must not leave a request behind that nobody waits for.
            self.cancel([local_id])
            self._spawn(self._discard_stored(call, submit))
            raise
        except BusUnavailable:
            # It may have been stored all the same.
            self.cancel([local_id])
            raise
        except BaseException:
            self._forget(call)
            raise
        call.metrics.accepted(codec.prompt_tokens)
        self._carry_out(call, call.attempts.stored(0, seq), None)

    def cancel(self, local_ids: list[str]) -> None:
        """Stop these requests everywhere; unknown ones are ignored."""
        ids = []
        for local_id in local_ids:
            call = self._by_local_id.get(local_id)
            if call is None:
                continue
            seq = call.attempts.seq
            if call.attempts.cancel():
                ids.append(call.request_id)
                self._forget(call)
                if seq is not None:
                    self._spawn(self._endings.discard(seq))
        if ids:
            self._bus.publish(self._bus.subjects.control, Cancel(request_ids=ids))

    def _hear(self, message: AnyMessage) -> None:
        match message:
            case Deltas():
                self._hear_deltas(message)
            case AttemptLost() | Rejected():
                if self._is_current(message.epoch):
                    self._hear_verdict(message)
            case Ping():
                pass
            case _:
                log.error("unexpected %s on the gateway's subject", type(message).__name__)

    def _hear_verdict(self, verdict: AttemptLost | Rejected) -> None:
        call, attempt = self._calls.get(verdict.request_id), verdict.attempt
        if isinstance(verdict, Rejected):
            if call is not None:
                self._carry_out(call, call.attempts.rejected(attempt, verdict.code, verdict.message), None)
        elif call is None:
            self._spawn(self._endings.settle(verdict.request_id, verdict.seq))
        else:
            call.deaths = max(call.deaths, verdict.deaths)
            log.warning("attempt lost", extra={"bus_id": call.request_id, "attempt": attempt, "cause": verdict.cause})
            self._carry_out(call, call.attempts.lost(attempt, verdict.cause, blameless=verdict.blameless), None)

    def _is_current(self, epoch: int) -> bool:
        """Whether a router of ``epoch`` may lead; 0 is of a version that does not say."""
        if 0 < epoch < self._epoch:
            log.warning("a deposed router of epoch %d is not listened to, epoch %d leads", epoch, self._epoch)
            return False
        self._epoch = max(self._epoch, epoch)
        return True

    def _hear_deltas(self, message: Deltas) -> None:
        arrivals: list[Arrival] = []
        now = time.monotonic()
        for delta in message.items:
            call = self._calls.get(delta.request_id)
            if call is None:
                self._metrics.stale_deltas.inc()
                continue
            actions = call.attempts.delta(delta.attempt, delta.offset, delta.tokens, delta.reason)
            if not actions:
                self._metrics.stale_deltas.inc()
                continue
            first = actions[0]
            if isinstance(first, Deliver):
                arrivals.append(self._arrive(call, delta, first, now))
            else:
                self._carry_out(call, actions, now)
        if arrivals:
            self._on_arrivals(arrivals)

    def _arrive(self, call: Call, delta: Delta, deliver: Deliver, now: float) -> Arrival:
        fresh = len(delta.tokens) - deliver.skip
        if fresh:
            if call.first_token_s is None:
                call.first_token_s = now
                call.cached_tokens = delta.cached_tokens or 0
                call.metrics.first_tokens(now - call.received_s, call.cached_tokens)
            else:
                call.metrics.next_tokens(now - call.progress_s, fresh)
            call.progress_s = now
        if deliver.reason is not None:
            self._forget(call)
            self._endings.add(call, deliver.reason, now)
        return Arrival(call.local_id, delta, deliver.skip, deliver.reason)

    def _carry_out(self, call: Call, actions: list[Action], now: float | None) -> None:
        for action in actions:
            match action:
                case Submit(attempt, offset):
                    self._metrics.resubmitted(call.attempts.mode.value)
                    log.info(
                        "resubmitting",
                        extra={"bus_id": call.request_id, "attempt": attempt, "offset_tokens": offset},
                    )
                    call.progress_s = time.monotonic()
                    call.missing_since_s = None
                    self._spawn(self._resubmit(call, action))
                case Deliver():
                    # Only a synthesized end comes here: what a delta brings is delivered by _hear_deltas.
                    empty = Delta(call.request_id, call.attempts.attempt, len(call.attempts.tokens), [])
                    self._on_arrivals([self._arrive(call, empty, action, now or time.monotonic())])
                case Discard(seq):
                    self._spawn(self._endings.settle(call.request_id, seq))
                case Withdraw(seq):
                    self._bus.publish(self._bus.subjects.control, Cancel(request_ids=[call.request_id]))
                    if seq is not None:
                        self._spawn(self._endings.settle(call.request_id, seq))
                case Fail(code, message):
                    self._forget(call)
                    self._metrics.attempts_failed.labels(code).inc()
                    log.error("request failed: %s", message, extra={"bus_id": call.request_id, "code": code})
                    self._on_failure(call, action)

    async def _store(self, call: Call, submit: Submit) -> int:
        delivered = call.attempts.tokens[: submit.offset]
        block_tokens = self.block_size.tokens
        request = Request(
            request_id=call.request_id,
            gateway=self._member_id,
            attempt=submit.attempt,
            created_s=call.created_s,
            prompt_tokens=call.codec.prompt_tokens + submit.offset,
            max_tokens=call.codec.max_tokens - submit.offset,
            offset=submit.offset,
            whole_output=call.codec.whole_output,
            api=self._api,
            body=call.codec.body(call.request_id, delivered),
            block_tokens=block_tokens,
            block_hashes=call.codec.block_hashes(delivered, block_tokens) if block_tokens else b"",
            deaths=call.deaths,
        )
        return await self._bus.accept(request, call.tenant, again(call.klass) if submit.attempt else call.klass)

    async def _resubmit(self, call: Call, submit: Submit) -> None:
        """Store a further attempt, however long that takes within the deadline: it was accepted. The queue of later
        attempts may be full with this very request: then the lost attempt makes room for it."""
        while not call.attempts.ended and submit.attempt == call.attempts.attempt:
            try:
                seq = await self._store(call, submit)
            except QueueFull as error:
                log.info("the queue is full, trying again: %s", error, extra={"bus_id": call.request_id})
                # Others would take the room during a pause.
                if call.attempts.seq is None or not await self._endings.discard(call.attempts.seq):
                    await asyncio.sleep(_RETRY_S)
            except BusUnavailable as error:
                log.warning("cannot resubmit yet: %s", error, extra={"bus_id": call.request_id})
                if self._bus.closed:
                    return
                await asyncio.sleep(_RETRY_S)
            except BusError as error:
                self._carry_out(call, call.attempts.unstorable(submit.attempt, str(error)), None)
                return
            else:
                self._carry_out(call, call.attempts.stored(submit.attempt, seq), None)
                return

    async def _discard_stored(self, call: Call, submit: Submit) -> None:
        """Take a request off the stream whose acknowledgement nobody waited for."""
        try:
            # What is on the stream is not stored again; where it stands is told.
            seq = await self._store(call, submit)
        except BusError as error:
            log.info("the cancelled request was not stored: %s", error)
        else:
            await self._endings.discard(seq)

    def _forget(self, call: Call) -> None:
        self._by_local_id.pop(call.local_id, None)
        if self._calls.pop(call.request_id, None) is not None:
            if call.on_end is not None:
                call.on_end(len(call.attempts.tokens))
            call.metrics.ended(len(call.attempts.tokens), call.first_token_s, call.progress_s)

    def _spawn(self, work: Coroutine[None, None, object]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[object]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("background task of the gateway failed", exc_info=error)
