"""What becomes of an attempt: it returns to its queue, is lost, rejected, cancelled or over."""

from __future__ import annotations

from llmserve.bus.flow.actions import Action, Broadcast, CheckStored, Discard, NotifyGateway
from llmserve.bus.flow.credits import WorkerState
from llmserve.bus.flow.entry import ON_WORKER, Entry
from llmserve.bus.flow.ledger import Ledger
from llmserve.bus.flow.rejections import Rejections
from llmserve.bus.flow.stats import Stats
from llmserve.bus.flow.timers import Memory
from llmserve.bus.messages import AttemptLost, Rejected, Stage, Sync

WAITED = ("lease", "holder", "stranded")
"""Causes of losing a handoff that no decode worker has had."""


class Outcomes:
    """Carries verdicts out in the ledger, counts them, and collects what the world has to be told."""

    def __init__(self, ledger: Ledger, stats: Stats) -> None:
        self.router = ""
        self.epoch = 0
        self.actions: list[Action] = []
        self.ended: Memory[int] = Memory(ledger.settings.memory_s)
        """Sequences that are over, so that late messages about them are known as late."""
        self.cancelled: Memory[str] = Memory(ledger.settings.memory_s)
        """Requests that were cancelled, before or after they came."""
        self.rejections = Rejections(ledger.settings.lost_retry_s)
        self._ledger = ledger
        self._stats = stats

    def lead(self, router: str, epoch: int) -> None:
        """Speak as this leader from now on. What was said without an epoch was nobody's word."""
        self.router, self.epoch = router, epoch
        self.rejections = Rejections(self._ledger.settings.lost_retry_s)

    def take_actions(self) -> list[Action]:
        """All that was collected since the last call."""
        actions, self.actions = self.actions, []
        return actions

    def adopt(self, entry: Entry, worker: WorkerState, stage: Stage, now_s: float) -> None:
        """A worker runs it without a grant of this router."""
        self._stats.adopted += 1
        self._ledger.adopt(entry, worker, stage, now_s)

    def requeue(self, entry: Entry, now_s: float) -> None:
        """A grant that certainly was not run goes back to the head."""
        if entry.cancelled:
            self.end(entry, now_s)
        elif entry.stage is not Stage.DECODE:
            self._stats.requeued += 1
            entry.paid = True
            self._ledger.queue(entry, now_s)
        elif entry.handoff is None or entry.holder is None or entry.holder.gone:
            self.lose(entry, "holder", "its pages are gone", now_s, stray=False)
        else:
            self._stats.requeued += 1
            self._ledger.wait(entry, entry.handoff, entry.holder, entry.lease_until_s, now_s)

    def lose(self, entry: Entry, cause: str, message: str, now_s: float, *, stray: bool = True) -> None:
        """``stray``: its worker may still run it."""
        if entry.cancelled:
            self.actions.append(Discard(entry.seq))
            self.end(entry, now_s, stray=stray)
            return
        self._stats.attempts_lost[cause] += 1
        entry.blameless = cause in WAITED
        self._ledger.lose(entry, now_s, stray=stray)
        self.notify_lost(entry, message)

    def notify_lost(self, entry: Entry, message: str) -> None:
        """Tell its gateway, which replaces the attempt or discards it."""
        lost = AttemptLost(
            request_id=entry.request_id,
            attempt=entry.attempt,
            seq=entry.seq,
            cause=message,
            epoch=self.epoch,
            deaths=entry.deaths,
            blameless=entry.blameless,
        )
        self.actions.append(NotifyGateway(entry.gateway, lost))

    def lose_with_worker(self, entries: list[Entry], cause: str, now_s: float, *, stray: bool = True) -> None:
        """Their worker died: of one of them, or of nothing that has to do with them.

        Whoever was there at two deaths and is alone in that killed both. Where several were, they are tried once
        more, apart from each other: see ``WorkerState.fits``.
        """
        most = max((entry.deaths for entry in entries), default=0)
        suspects = [entry for entry in entries if entry.deaths == most and not entry.cancelled]
        guilty = suspects[0] if most and len(suspects) == 1 else None
        for entry in entries:
            entry.deaths += 1
            if entry is guilty:
                self.reject(entry, "poison", f"ended {entry.deaths} workers that ran it: {cause}", now_s)
            else:
                self.lose(entry, "worker", cause, now_s, stray=stray)

    def reject(self, entry: Entry, code: str, message: str, now_s: float) -> None:
        """It cannot be served; its gateway hears why."""
        self._stats.rejected[code] += 1
        rejected = Rejected(
            request_id=entry.request_id, attempt=entry.attempt, code=code, message=message, epoch=self.epoch
        )
        notice = NotifyGateway(entry.gateway, rejected)
        self.rejections.add(notice, now_s)
        self.actions += [notice, Discard(entry.seq)]
        self._ledger.settle(entry, 0, entry.prompt_tokens)
        self._ledger.forget(entry)

    def cancel(self, entry: Entry, now_s: float, *, for_good: bool = True) -> None:
        """A worker that runs it heard of it too: its credit returns with ``Finished`` or the next inventories.

        ``for_good``: no later attempt is run either. A gateway that was silent may be there after all.
        """
        if entry.cancelled:
            return
        self._stats.cancelled += 1
        if for_good:
            self.cancelled.add(entry.request_id, now_s)
        self.actions.append(Discard(entry.seq))
        if entry.place in ON_WORKER:
            entry.cancelled = True
            return
        self._ledger.settle(entry, len(entry.handoff.tokens) if entry.handoff else 0, 0)
        self.end(entry, now_s)

    def end(self, entry: Entry, now_s: float, *, stray: bool = False) -> None:
        """It is over. ``stray``: its worker may still run it."""
        self.ended.add(entry.seq, now_s)
        self._ledger.forget(entry, stray=stray)

    def check_stored(self, entry: Entry) -> None:
        """Ask whether it is still on the stream."""
        entry.checking = True
        self.actions.append(CheckStored(entry.seq))

    def broadcast_sync(self) -> None:
        """Ask all workers for their inventories."""
        self.actions.append(Broadcast(Sync(epoch=self.epoch, router=self.router)))
