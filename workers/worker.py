"""One worker: the decisions of ``WorkerState`` between a bus and an engine."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass, field
from functools import partial

from msgspec.structs import replace

from llmserve.bus.base import Bus, BusError, Subscription
from llmserve.bus.cache_salt import CacheSalts
from llmserve.bus.membership import Beater
from llmserve.bus.messages import AnyMessage, Cancel, Failed, Grant, Heartbeat, KvResync, Sync
from llmserve.workers.actions import Abort, Action, Beat, Complete, Deliver, Fetch, FetchAhead, Submit, Tell
from llmserve.workers.cache_use import CacheUse
from llmserve.workers.completions import Completions
from llmserve.workers.engine.base import Engine, EngineDied, EngineError, EngineInfo, EngineLoad, Step, Work
from llmserve.workers.kv_feed import KvFeed
from llmserve.workers.metrics import OneWorker
from llmserve.workers.page_news import PageNews
from llmserve.workers.rate import Rate
from llmserve.workers.reports import Identity
from llmserve.workers.state import WorkerState

logger = logging.getLogger(__name__)


class WorkerDied(Exception):
    """The worker's engine died; everything that ran on it was reported as failed."""


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What a worker needs to know beside its engine."""

    lease_s: float = 30.0
    """How long its engine holds prefilled pages for a decode worker."""
    remember_s: float = 60.0
    """How long cancelled and ended requests are remembered."""
    parallel_completions: int = 16
    """Results that are being recorded at once."""
    salts: CacheSalts = field(default_factory=lambda: CacheSalts("", {}))
    """Of the deployment: each tenant's pages are salted here, whatever its requests say."""


class Worker:
    """``start``, then ``run`` until ``drain`` or ``stop`` is called, or the engine dies.

    The bus stays the caller's, who closes it. Restarted workers need a new ``Worker`` with another member id.
    """

    def __init__(
        self, bus: Bus, engine: Engine, identity: Identity, settings: WorkerSettings, metrics: OneWorker
    ) -> None:
        self.state: WorkerState
        self._bus = bus
        self._engine = engine
        self._identity = identity
        self._settings = settings
        self._metrics = metrics
        self._beater = Beater(bus, self._heartbeat)
        self._subscriptions: list[Subscription] = []
        self._pages: PageNews
        self._completions: Completions
        self._prefill_rate = Rate()
        self._cache_use = CacheUse(identity.role)
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended = asyncio.Event()
        self._progress = asyncio.Event()
        self._running = False
        self._stopped = False

    @property
    def alive(self) -> bool:
        """Whether it serves."""
        return bool(self._subscriptions) and not self._stopped

    async def start(self) -> EngineInfo:
        """Start the engine and join the deployment. Raises ``EngineError`` or ``BusError``; close with ``stop``."""
        info = await self._engine.start()
        settings, subjects = self._settings, self._bus.subjects
        self.state = WorkerState(
            self._identity,
            info,
            lease_s=settings.lease_s,
            remember_s=settings.remember_s,
            salts=settings.salts,
        )
        member = self._identity.member
        feed = KvFeed(member, info.fingerprint, info.page_tokens, self._identity.host)
        self._pages = PageNews(self._bus, feed, member, self._metrics)
        self._completions = Completions(self._bus, self.state, self._act, self._metrics)
        for subject in (subjects.work(member), subjects.control, subjects.kv_resync(member)):
            self._subscriptions.append(await self._bus.subscribe(subject, self._on_message))
        self._completions.start(settings.parallel_completions)
        self._beater.start()
        return info

    async def run(self) -> None:
        """Step the engine until the worker is stopped. Raises ``WorkerDied``."""
        self._running = True
        stepping = asyncio.create_task(self._step_for_ever())
        ended = asyncio.create_task(self._ended.wait())
        try:
            await asyncio.wait((stepping, ended), return_when=asyncio.FIRST_COMPLETED)
            if not stepping.done():
                return
            error = stepping.exception()
            cause = f"engine died: {error}"
            self._act(self.state.give_up(cause, time.monotonic(), died=True))
            if isinstance(error, EngineDied):
                raise WorkerDied(cause) from error
            if error is not None:
                raise error
        finally:
            self._running = False
            self._progress.set()
            stepping.cancel()
            ended.cancel()
            await asyncio.gather(stepping, ended, return_exceptions=True)

    async def drain(self, deadline_s: float) -> None:
        """Take no more grants, let what runs end and what is held be fetched, then ``stop``.

        What is left after ``deadline_s``, or when ``run`` ends before, is reported as failed.
        """
        self._act(self.state.drain())
        try:
            async with asyncio.timeout(deadline_s):
                while self._running and not self.state.idle:
                    self._progress.clear()
                    await self._progress.wait()
        except TimeoutError:
            logger.warning("worker %s: %d requests did not end in time", self._identity.member, len(self.state.tasks))
        await self.stop("the worker's drain deadline passed")

    async def stop(self, cause: str = "the worker stops") -> None:
        """Report what still runs as failed, leave, and close the engine. Never raises, may be called twice."""
        if self._stopped:
            return
        self._stopped = True
        self._ended.set()
        await self._beater.stop()
        if self._subscriptions:
            self._pages.stop()
            await self._leave(cause)
            await self._completions.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._engine.close()
        self._metrics.gone()

    async def _leave(self, cause: str) -> None:
        for subscription in self._subscriptions:
            try:
                await subscription.unsubscribe()
            except BusError as error:
                self._failed("unsubscribe", error)
        self._act(self.state.give_up(cause, time.monotonic()))
        try:
            async with asyncio.timeout(2.0):
                await self._completions.recorded()
        except TimeoutError:
            logger.warning("worker %s: results were not recorded in time", self._identity.member)
        try:
            self._bus.publish(self._bus.subjects.heartbeats, self.state.heartbeat(EngineLoad(), leaving=True))
            await self._bus.flush()
        except BusError as error:
            self._failed("leave", error)

    # -- in --------------------------------------------------------------------------------------------------------

    def _on_message(self, message: AnyMessage) -> None:
        now_s = time.monotonic()
        if isinstance(message, Grant):
            self._act(self.state.granted(message, now_s))
        elif isinstance(message, Cancel):
            self._act(self.state.cancelled(message, now_s))
        elif isinstance(message, Sync):
            self._act(self.state.synced(message, now_s))
        elif isinstance(message, KvResync):
            self._pages.tell_all()

    async def _step_for_ever(self) -> None:
        last_s = time.monotonic()
        while True:
            busy = self._engine.load().running > 0
            step = await self._engine.step()
            now_s = time.monotonic()
            if step.kv or step.kv_unheard:
                self._pages.note(step.kv, unheard=step.kv_unheard)
                if step == Step(kv=step.kv, kv_unheard=step.kv_unheard):
                    continue
            self._cache_use.saw(step)
            self._metrics.stepped(step, now_s - last_s if busy else None, partial(self.state.tenant_of, now_s=now_s))
            if busy and step.prefill_tokens:
                self._prefill_rate.add(step.prefill_tokens, now_s - last_s)
            last_s = now_s
            self._act(self.state.stepped(step, now_s))

    # -- out -------------------------------------------------------------------------------------------------------

    def _act(self, actions: Iterable[Action]) -> None:
        """Carry actions out in their order; what they lead to comes right after each."""
        for action in actions:
            match action:
                case Deliver():
                    self._publish(self._bus.subjects.gateway(action.gateway), action)
                case Tell():
                    self._publish(self._bus.subjects.events, action)
                case Submit():
                    self._submit(action)
                case FetchAhead(work):
                    self._fetch_ahead(work)
                case Abort():
                    self._engine.abort(action.work_ids)
                case Fetch():
                    self._spawn(self._fetch(action.grant))
                case Complete():
                    self._completions.add(action)
                case Beat():
                    self._beat(at_once=action.at_once)
        self._progress.set()

    def _publish(self, subject: str, action: Deliver | Tell) -> None:
        message = action.deltas if isinstance(action, Deliver) else action.event
        try:
            self._bus.publish(subject, message)
        except BusError as error:
            self._failed("publish", error)
        if isinstance(action, Tell):
            if isinstance(event := action.event, Failed):
                ids = {"request_id": event.request_id, "attempt": event.attempt}
                logger.warning("failed: %s", event.error, extra=ids)
            self._metrics.told(action.event)

    def _beat(self, *, at_once: bool) -> None:
        if self._stopped:
            return
        if not at_once:
            self._beater.changed()
            return
        try:
            self._beater.beat()
        except BusError as error:
            self._failed("heartbeat", error)

    def _submit(self, action: Submit) -> None:
        try:
            self._engine.submit(dataclasses.replace(action.work, compute_tokens_s=self._prefill_rate.per_s))
        except EngineError as error:
            self._act(self.state.refused(action, str(error), retry=isinstance(error, EngineDied)))
        else:
            self._act(self.state.accepted(action))

    def _fetch_ahead(self, work: Work) -> None:
        try:
            self._engine.submit(work)
        except EngineError as error:
            self._failed("fetch ahead", error)

    async def _fetch(self, grant: Grant) -> None:
        try:
            stored = await self._bus.fetch(grant.seq)
        except BusError as error:
            self._failed("fetch", error)
            self._act(self.state.not_fetched(grant, f"the request cannot be fetched: {error}"))
        else:
            self._act(self.state.fetched(grant, stored, time.monotonic()))

    def _heartbeat(self) -> Heartbeat:
        load = self._engine.load()
        self._metrics.show(self.state, load)
        return replace(
            self.state.heartbeat(load),
            kv_seq=self._pages.seq,
            prefill_tokens_s=self._prefill_rate.per_s,
            load_tokens_s=load.load_tokens_s,
            cache=str(self._cache_use),
        )

    def _spawn(self, call: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(call)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _failed(self, what: str, error: BusError | EngineError) -> None:
        self._metrics.failed(what)
        logger.error("worker %s: %s failed: %s", self._identity.member, what, error)
