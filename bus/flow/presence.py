"""Members that come, show what they have, fall silent and go; and what falls due with time."""

from __future__ import annotations

from llmserve.bus.flow.actions import Broadcast
from llmserve.bus.flow.credits import WorkerState
from llmserve.bus.flow.entry import Entry, Place
from llmserve.bus.flow.events import Absent, MemberLost, NoResponders, Reconnected, Tick
from llmserve.bus.flow.handoffs import Handoffs
from llmserve.bus.flow.ledger import Ledger
from llmserve.bus.flow.members import Members
from llmserve.bus.flow.outcomes import Outcomes
from llmserve.bus.flow.stats import Stats
from llmserve.bus.messages import Cancel, Heartbeat


class Presence:
    """Handles heartbeats, their absence, and the clock."""

    def __init__(
        self, ledger: Ledger, members: Members, outcomes: Outcomes, handoffs: Handoffs, stats: Stats
    ) -> None:
        self._ledger = ledger
        self._settings = ledger.settings
        self._members = members
        self._outcomes = outcomes
        self._handoffs = handoffs
        self._stats = stats
        self._synced_s = 0.0

    def heartbeat(self, beat: Heartbeat, now_s: float) -> None:
        """Take in a member's credit and inventory."""
        if beat.leaving:
            self._member_lost(beat.member, "worker is leaving", now_s, died=False)
            return
        worker = self._members.hear(beat, now_s)
        if worker is None:
            return
        outcomes = self._outcomes
        report = self._members.reconcile(worker, outcomes.ended, now_s)
        for entry, line in report.adopt:
            outcomes.adopt(entry, worker, line.stage, now_s)
        for entry in report.confirm:
            self._ledger.confirm(entry, now_s)
        for entry in report.unheld:
            outcomes.lose(entry, "holder", "its pages are no longer held", now_s)
        for entry in report.missing:
            outcomes.check_stored(entry)
        if report.resync and now_s - self._synced_s >= 1.0:
            self._synced_s = now_s
            outcomes.broadcast_sync()
        self._ledger.recount_strays(worker)
        self._handoffs.worker_known(worker.member, now_s)

    def member_lost(self, event: MemberLost, now_s: float) -> None:
        self._member_lost(event.member, "reported gone", now_s)

    def absent(self, event: Absent, now_s: float) -> None:
        """Nobody listens at a member's own subject: after a moment, in which it may reconnect, it is gone."""
        if self._members.absent(event.member, now_s):
            self._member_lost(event.member, "nobody listens there", now_s)

    def no_responders(self, event: NoResponders, now_s: float) -> None:
        """A grant found nobody at its worker: the grant is certainly not run, the worker most likely gone."""
        entry = self._ledger.entries.get(event.seq)
        worker = self._ledger.workers.get(event.worker)
        if entry is not None and entry.place is Place.GRANTED and entry.worker is not None:
            if entry.worker.member != event.worker:
                return
            self._outcomes.requeue(entry, now_s)
        if worker is None:
            return
        worker.muted = True
        if self._members.absent(event.worker, now_s):
            self._worker_lost(worker, "nobody listens at the worker", now_s, unconfirmed=False)

    def reconnected(self, event: Reconnected, now_s: float) -> None:
        self._members.reconnected(now_s)
        self._outcomes.broadcast_sync()

    def tick(self, event: Tick, now_s: float) -> None:
        """Act on all that has fallen due."""
        outcomes, patience_s = self._outcomes, self._settings.retry_patience_s
        for entry in self._ledger.timers.due(now_s):
            self._due(entry, now_s)
        for member in self._members.silent(now_s):
            self._member_lost(member, f"silent for {self._settings.member_timeout_s:g} s", now_s)
        for entry, api in self._members.without_workers(now_s):
            outcomes.reject(entry, "unservable", f"no worker runs engine API {api!r}", now_s)
        for entry, role in self._members.unavailable(now_s):
            outcomes.reject(entry, "unavailable", f"no live worker of role {role} for {patience_s:g} s", now_s)
        for entry in self._members.stranded(now_s):
            outcomes.lose(entry, "stranded", f"no live worker can read its pages for {patience_s:g} s", now_s)
        outcomes.actions += outcomes.rejections.due(now_s)
        outcomes.ended.forget(now_s)
        outcomes.cancelled.forget(now_s)
        self._handoffs.forget(now_s)

    def _due(self, entry: Entry, now_s: float) -> None:
        outcomes = self._outcomes
        if entry.place is Place.QUEUED:
            limit_s, deadline_s = self._ledger.patience_s(entry), self._settings.queue_deadline_s
            code = "overdue" if limit_s < deadline_s else "deadline"
            outcomes.reject(entry, code, f"queued for more than {min(limit_s, deadline_s):g} s", now_s)
        elif entry.place is Place.GRANTED and self._members.returning(now_s):
            # What its worker said was lost with the bus; the inventories that come now will say it again.
            self._ledger.timers.set(now_s + self._settings.confirm_timeout_s, entry)
        elif entry.place is Place.GRANTED:
            self._stats.confirm_timeouts += 1
            outcomes.lose(entry, "confirm", "its worker did not confirm the grant", now_s)
        elif entry.place is Place.WAITING:
            outcomes.lose(entry, "lease", "no decode worker was free within the lease of its pages", now_s)
        elif entry.place is Place.LOST:
            outcomes.check_stored(entry)
            self._ledger.timers.set(now_s + self._settings.lost_retry_s, entry)

    def _member_lost(self, member: str, cause: str, now_s: float, *, died: bool = True) -> None:
        worker = self._ledger.workers.get(member)
        if worker is not None:
            self._worker_lost(worker, cause, now_s, unconfirmed=True, died=died)
        gateway = self._ledger.gateways.get(member)
        if gateway is None or not self._outcomes.epoch:
            # A standby hears from the leader which requests that ended.
            return
        entries = list(gateway.requests.values())
        if entries:
            request_ids = [entry.request_id for entry in entries]
            self._outcomes.actions.append(Broadcast(Cancel(request_ids=request_ids, epoch=self._outcomes.epoch)))
        for entry in entries:
            self._outcomes.cancel(entry, now_s, for_good=False)
        if not gateway.requests:
            del self._ledger.gateways[member]

    def _worker_lost(
        self, worker: WorkerState, cause: str, now_s: float, *, unconfirmed: bool, died: bool = True
    ) -> None:
        """``unconfirmed``: whether grants without a confirmation are lost too; the server tells of each otherwise.
        ``died``: it did not leave in order."""
        self._ledger.drop_worker(worker)
        for entry in list(worker.holding.values()):
            self._outcomes.lose(entry, "holder", cause, now_s)
        entries = [entry for entry in worker.book.values() if unconfirmed or entry.place is Place.RUNNING]
        if died:
            self._outcomes.lose_with_worker(entries, cause, now_s)
            return
        for entry in entries:
            self._outcomes.lose(entry, "worker", cause, now_s)
