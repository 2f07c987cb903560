"""The router's decisions, without I/O: events in, actions out, the same for the same history."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, TypeVar, cast

from llmserve.bus.base import StoredRequest
from llmserve.bus.flow.actions import Action, Broadcast, CheckStored, Discard, NotifyGateway, SendGrant
from llmserve.bus.flow.credits import WorkerState
from llmserve.bus.flow.dispatch import Dispatcher, Granted
from llmserve.bus.flow.entry import ON_WORKER, Entry, Place
from llmserve.bus.flow.events import Checked, Event, MemberLost, NoResponders, Reconnected, Tick
from llmserve.bus.flow.ledger import Ledger
from llmserve.bus.flow.members import Members
from llmserve.bus.flow.rejections import Rejections
from llmserve.bus.flow.settings import RouterSettings
from llmserve.bus.flow.stats import Stats
from llmserve.bus.flow.timers import Memory
from llmserve.bus.messages import (
    Accepted,
    AttemptLost,
    Cancel,
    Failed,
    Finished,
    Grant,
    HandedOff,
    Heartbeat,
    Reason,
    Refused,
    Rejected,
    Stage,
    Sync,
    encode,
)

E = TypeVar("E")


class RouterCore:
    """One deployment's router. ``handle`` takes what happened, ``dispatch`` grants what can be granted.

    Times are seconds of any clock that never goes back. The order of calls and ``rng`` decide everything.
    """

    def __init__(self, settings: RouterSettings, rng: random.Random) -> None:
        self.settings = settings
        self.router = ""
        self.epoch = 0
        self.stats = Stats()
        self.ledger = Ledger(settings)
        self.members = Members(self.ledger)
        self._dispatcher = Dispatcher(self.ledger, rng)
        self._ended: Memory[int] = Memory(settings.memory_s)
        self._cancelled: Memory[str] = Memory(settings.memory_s)
        self._rejections = Rejections(settings.lost_retry_s)
        self._early: dict[int, tuple[HandedOff, float]] = {}
        """Handoffs whose request or worker is not known yet, and when they came."""
        self._synced_s = 0.0
        self._actions: list[Action] = []

    def begin(self, router: str, epoch: int) -> None:
        """Lead from now on, under ``epoch``."""
        self.router, self.epoch = router, epoch

    def handle(self, event: Event, now_s: float) -> list[Action]:
        """Take one event in; O(log requests), for heartbeats linear in their inventory. ``dispatch`` comes next."""
        handler = cast("Callable[[RouterCore, Event, float], None]", _HANDLERS[type(event)])
        handler(self, event, now_s)
        return self._taken()

    def dispatch(self, now_s: float) -> list[Action]:
        """Grant all that fits, in fair order. One call may follow any number of events."""
        for decision in self._dispatcher.dispatch(now_s):
            if isinstance(decision, Granted):
                self.stats.grants[decision.entry.stage] += 1
                grant = self._grant_of(decision.entry)
                self._actions.append(SendGrant(decision.worker.member, grant, decision.waited_s))
            else:
                self._reject(decision.entry, "unservable", decision.message, now_s)
        return self._taken()

    def check(self) -> None:
        """Assert every invariant; linear in all that is known."""
        self.ledger.check()

    # -- the stream -----------------------------------------------------------------------------------------------

    def _on_stored(self, stored: StoredRequest, now_s: float) -> None:
        request = stored.request
        if stored.seq in self.ledger.entries or stored.seq in self._ended:
            return
        current = self.ledger.by_request.get(request.request_id)
        if request.request_id in self._cancelled or (current is not None and current.attempt >= request.attempt):
            self._actions.append(Discard(stored.seq))
            return
        entry = Entry.of(stored, now_s, self.settings.inline_bytes)
        if current is not None:
            self._supersede(current, entry, now_s)
        self.ledger.add(entry)
        claim = self.members.take_claim(entry)
        if claim is not None:
            self._adopt(entry, *claim, now_s)
        else:
            self.ledger.queue(entry, now_s)
        self._apply_early(entry.seq, now_s)

    def _supersede(self, old: Entry, new: Entry, now_s: float) -> None:
        new.charges, old.charges = old.charges, []
        if old.worker is not None:
            old.worker.strays += 1
        self._end(old, now_s)
        self._actions.append(Discard(old.seq))

    def _on_checked(self, checked: Checked, now_s: float) -> None:
        entry = self.ledger.entries.get(checked.seq)
        if entry is None:
            return
        asked, entry.checking = entry.checking, False
        if checked.stored is False:
            self.ledger.settle(entry, 0, 0)
            self._end(entry, now_s)
        elif checked.stored and asked and entry.place is Place.LOST:
            self._notify_lost(entry, "still on the stream")
        elif checked.stored and asked and entry.place in ON_WORKER:
            self._lose(entry, "inventory", "its worker does not know it", now_s)

    # -- workers' messages ----------------------------------------------------------------------------------------

    def _on_accepted(self, event: Accepted, now_s: float) -> None:
        entry = self._granted_to(event.worker, event.seq, event.stage)
        if entry is not None and entry.place is Place.GRANTED:
            self.ledger.confirm(entry, now_s)

    def _on_refused(self, event: Refused, now_s: float) -> None:
        entry = self._granted_to(event.worker, event.seq, event.stage)
        if entry is None or entry.place is not Place.GRANTED or entry.worker is None:
            return
        if event.retry:
            entry.worker.muted = True
            self._requeue(entry, now_s)
        else:
            self._reject(entry, "unservable", event.reason, now_s)

    def _on_handed_off(self, event: HandedOff, now_s: float) -> None:
        if event.seq in self._ended:
            return
        entry, holder = self.ledger.entries.get(event.seq), self.ledger.workers.get(event.worker)
        if entry is None or holder is None:
            self._early[event.seq] = (event, now_s)
        elif entry.attempt == event.attempt and not entry.cancelled:
            self._wait(entry, holder, event, now_s, now_s)

    def _wait(self, entry: Entry, holder: WorkerState, event: HandedOff, sent_s: float, now_s: float) -> None:
        prefilling = entry.place in ON_WORKER and entry.stage is Stage.PREFILL and entry.worker is holder
        again = entry.place is Place.WAITING and entry.holder is holder
        if not (prefilling or again or entry.place is Place.QUEUED):
            return
        margin_s = min(self.settings.lease_margin_s, event.lease_s / 2)
        self.ledger.wait(entry, event, holder, sent_s + event.lease_s - margin_s, now_s)

    def _apply_early(self, seq: int, now_s: float) -> None:
        event, came_s = self._early.get(seq, (None, 0.0))
        if event is None:
            return
        entry, holder = self.ledger.entries.get(seq), self.ledger.workers.get(event.worker)
        if entry is not None and holder is not None:
            del self._early[seq]
            if entry.attempt == event.attempt and not entry.cancelled:
                self._wait(entry, holder, event, came_s, now_s)

    def _on_finished(self, event: Finished, now_s: float) -> None:
        entry = self.ledger.entries.get(event.seq)
        self._ended.add(event.seq, now_s)
        self._early.pop(event.seq, None)
        if entry is None:
            return
        self.stats.finished += 1
        if event.reason in (Reason.STOP, Reason.LENGTH):
            self.ledger.costs.learn(entry, event.output_tokens)
        elif event.reason is Reason.CANCELLED:
            self._actions.append(Discard(entry.seq))
        if entry.worker is not None and entry.worker.member != event.worker:
            entry.worker.strays += 1
        self.ledger.settle(entry, event.output_tokens, event.cached_tokens)
        self._end(entry, now_s)

    def _on_failed(self, event: Failed, now_s: float) -> None:
        entry = self._granted_to(event.worker, event.seq, event.stage)
        held = self.ledger.entries.get(event.seq)
        if entry is not None:
            self._lose(entry, "failed", event.error, now_s, stray=False)
        elif (
            held is not None
            and held.place is Place.WAITING
            and held.holder is not None
            and held.holder.member == event.worker
        ):
            self._lose(held, "failed", event.error, now_s)

    # -- members --------------------------------------------------------------------------------------------------

    def _on_heartbeat(self, beat: Heartbeat, now_s: float) -> None:
        if beat.leaving:
            self._member_lost(beat.member, "worker is leaving", now_s)
            return
        worker = self.members.hear(beat, now_s)
        if worker is None:
            return
        report = self.members.reconcile(worker, self._ended, now_s)
        for entry, line in report.adopt:
            self._adopt(entry, worker, line.stage, now_s)
        for entry in report.confirm:
            self.ledger.confirm(entry, now_s)
        for entry in report.unheld:
            self._lose(entry, "holder", "its pages are no longer held", now_s)
        for entry in report.missing:
            entry.checking = True
            self._actions.append(CheckStored(entry.seq))
        if report.resync and now_s - self._synced_s >= 1.0:
            self._synced_s = now_s
            self._actions.append(Broadcast(Sync(epoch=self.epoch, router=self.router)))
        worker.recount_strays()
        for seq in [seq for seq, (event, _) in self._early.items() if event.worker == worker.member]:
            self._apply_early(seq, now_s)

    def _on_member_lost(self, event: MemberLost, now_s: float) -> None:
        self._member_lost(event.member, "reported gone", now_s)

    def _on_no_responders(self, event: NoResponders, now_s: float) -> None:
        entry = self.ledger.entries.get(event.seq)
        worker = self.ledger.workers.get(event.worker)
        if entry is not None and entry.place is Place.GRANTED and entry.worker is not None:
            if entry.worker.member != event.worker:
                return
            self._requeue(entry, now_s)
        if worker is None:
            return
        worker.muted = True
        if not self.members.returning(now_s):
            self._worker_lost(worker, "nobody listens at the worker", now_s, unconfirmed=False)

    def _on_reconnected(self, event: Reconnected, now_s: float) -> None:
        self.members.reconnected(now_s)
        self._actions.append(Broadcast(Sync(epoch=self.epoch, router=self.router)))

    def _member_lost(self, member: str, cause: str, now_s: float) -> None:
        worker = self.ledger.workers.get(member)
        if worker is not None:
            self._worker_lost(worker, cause, now_s, unconfirmed=True)
        gateway = self.ledger.gateways.get(member)
        if gateway is None:
            return
        entries = list(gateway.requests.values())
        if entries:
            self._actions.append(Broadcast(Cancel(request_ids=[entry.request_id for entry in entries])))
        for entry in entries:
            self._cancel(entry, now_s)
        if not gateway.requests:
            del self.ledger.gateways[member]

    def _worker_lost(self, worker: WorkerState, cause: str, now_s: float, *, unconfirmed: bool) -> None:
        """``unconfirmed``: whether grants without a confirmation are lost too; the server tells of each otherwise."""
        worker.gone = True
        del self.ledger.workers[worker.member]
        for entry in list(worker.holding.values()):
            self._lose(entry, "holder", cause, now_s)
        for entry in list(worker.book.values()):
            if unconfirmed or entry.place is Place.RUNNING:
                self._lose(entry, "worker", cause, now_s)

    # -- cancellation and time ------------------------------------------------------------------------------------

    def _on_cancel(self, event: Cancel, now_s: float) -> None:
        for request_id in event.request_ids:
            self._cancelled.add(request_id, now_s)
            self._rejections.answered(request_id)
            entry = self.ledger.by_request.get(request_id)
            if entry is not None:
                self._cancel(entry, now_s)

    def _cancel(self, entry: Entry, now_s: float) -> None:
        """A worker that runs it heard of it too: its credit returns with ``Finished`` or the next inventories."""
        if entry.cancelled:
            return
        self.stats.cancelled += 1
        self._cancelled.add(entry.request_id, now_s)
        self._actions.append(Discard(entry.seq))
        if entry.place in ON_WORKER:
            entry.cancelled = True
            return
        self.ledger.settle(entry, len(entry.handoff.tokens) if entry.handoff else 0, 0)
        self._end(entry, now_s)

    def _on_tick(self, event: Tick, now_s: float) -> None:
        for entry in self.ledger.timers.due(now_s):
            self._on_due(entry, now_s)
        for member in self.members.silent(now_s):
            self._member_lost(member, f"silent for {self.settings.member_timeout_s:g} s", now_s)
        for entry, api in self.members.without_workers(now_s):
            self._reject(entry, "unservable", f"no worker runs engine API {api!r}", now_s)
        patience_s = self.settings.retry_patience_s
        for entry, role in self.members.unavailable(now_s):
            self._reject(entry, "unavailable", f"no live worker of role {role} for {patience_s:g} s", now_s)
        for entry in self.members.stranded(now_s):
            self._lose(entry, "stranded", f"no live worker can read its pages for {patience_s:g} s", now_s)
        self._actions += self._rejections.due(now_s)
        self._ended.forget(now_s)
        self._cancelled.forget(now_s)
        for seq, (event_, came_s) in list(self._early.items()):
            if came_s + event_.lease_s <= now_s:
                del self._early[seq]

    def _on_due(self, entry: Entry, now_s: float) -> None:
        if entry.place is Place.QUEUED:
            self._reject(entry, "deadline", f"queued for more than {self.settings.max_wait_s:g} s", now_s)
        elif entry.place is Place.GRANTED:
            self.stats.confirm_timeouts += 1
            self._lose(entry, "confirm", "its worker did not confirm the grant", now_s)
        elif entry.place is Place.WAITING:
            self._lose(entry, "lease", "no decode worker was free within the lease of its pages", now_s)
        elif entry.place is Place.LOST:
            entry.checking = True
            self._actions.append(CheckStored(entry.seq))
            self.ledger.timers.set(now_s + self.settings.lost_retry_s, entry)

    # -- ends and returns -----------------------------------------------------------------------------------------

    def _adopt(self, entry: Entry, worker: WorkerState, stage: Stage, now_s: float) -> None:
        self.stats.adopted += 1
        self.ledger.adopt(entry, worker, stage, now_s)
        worker.recount_strays()

    def _requeue(self, entry: Entry, now_s: float) -> None:
        """A grant that certainly was not run goes back to the head."""
        if entry.cancelled:
            self._end(entry, now_s)
        elif entry.stage is not Stage.DECODE:
            self.stats.requeued += 1
            entry.paid = True
            self.ledger.queue(entry, now_s)
        elif entry.handoff is None or entry.holder is None or entry.holder.gone:
            self._lose(entry, "holder", "its pages are gone", now_s, stray=False)
        else:
            self.stats.requeued += 1
            self.ledger.wait(entry, entry.handoff, entry.holder, entry.lease_until_s, now_s)

    def _lose(self, entry: Entry, cause: str, message: str, now_s: float, *, stray: bool = True) -> None:
        """``stray``: its worker may still run it."""
        if entry.cancelled:
            self._actions.append(Discard(entry.seq))
            self._end(entry, now_s)
            return
        self.stats.attempts_lost[cause] += 1
        self.ledger.lose(entry, now_s, stray=stray)
        self._notify_lost(entry, message)

    def _notify_lost(self, entry: Entry, message: str) -> None:
        lost = AttemptLost(request_id=entry.request_id, attempt=entry.attempt, seq=entry.seq, cause=message)
        self._actions.append(NotifyGateway(entry.gateway, lost))

    def _reject(self, entry: Entry, code: str, message: str, now_s: float) -> None:
        self.stats.rejected[code] += 1
        rejected = Rejected(request_id=entry.request_id, attempt=entry.attempt, code=code, message=message)
        notice = NotifyGateway(entry.gateway, rejected)
        self._rejections.add(notice, now_s)
        self._actions += [notice, Discard(entry.seq)]
        self.ledger.settle(entry, 0, entry.prompt_tokens)
        self.ledger.forget(entry)

    def _end(self, entry: Entry, now_s: float) -> None:
        self._ended.add(entry.seq, now_s)
        self.ledger.forget(entry)

    def _granted_to(self, worker: str, seq: int, stage: Stage) -> Entry | None:
        """The request, if it is granted to or running on that worker in that stage."""
        entry = self.ledger.entries.get(seq)
        if entry is None or entry.worker is None or entry.worker.member != worker or entry.stage is not stage:
            return None
        return entry

    def _grant_of(self, entry: Entry) -> Grant:
        return Grant(
            epoch=self.epoch,
            seq=entry.seq,
            tenant=entry.tenant,
            klass=entry.klass,
            stage=entry.stage,
            attempt=entry.attempt,
            request=entry.data,
            handoff=encode(entry.handoff) if entry.handoff is not None else b"",
        )

    def _taken(self) -> list[Action]:
        actions, self._actions = self._actions, []
        return actions


_HANDLERS: dict[type, Callable[[RouterCore, Any, float], None]] = {
    StoredRequest: RouterCore._on_stored,
    Accepted: RouterCore._on_accepted,
    Refused: RouterCore._on_refused,
    HandedOff: RouterCore._on_handed_off,
    Finished: RouterCore._on_finished,
    Failed: RouterCore._on_failed,
    Heartbeat: RouterCore._on_heartbeat,
    Cancel: RouterCore._on_cancel,
    NoResponders: RouterCore._on_no_responders,
    MemberLost: RouterCore._on_member_lost,
    Checked: RouterCore._on_checked,
    Reconnected: RouterCore._on_reconnected,
    Tick: RouterCore._on_tick,
}
