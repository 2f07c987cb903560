"""What workers say of single grants: taken, refused, done, failed."""

from __future__ import annotations

from llmserve.bus.flow.actions import Discard
from llmserve.bus.flow.entry import Entry, Place
from llmserve.bus.flow.handoffs import Handoffs
from llmserve.bus.flow.ledger import Ledger
from llmserve.bus.flow.outcomes import Outcomes
from llmserve.bus.flow.stats import Stats
from llmserve.bus.messages import Accepted, Failed, Finished, Reason, Refused, Stage


class Progress:
    """Handles the messages about one request on one worker."""

    def __init__(self, ledger: Ledger, outcomes: Outcomes, handoffs: Handoffs, stats: Stats) -> None:
        self._ledger = ledger
        self._outcomes = outcomes
        self._handoffs = handoffs
        self._stats = stats

    def accepted(self, event: Accepted, now_s: float) -> None:
        entry = self._granted_to(event.worker, event.seq, event.stage)
        if entry is not None and entry.place is Place.GRANTED:
            self._ledger.confirm(entry, now_s)

    def refused(self, event: Refused, now_s: float) -> None:
        entry = self._granted_to(event.worker, event.seq, event.stage)
        if entry is None or entry.place is not Place.GRANTED or entry.worker is None:
            return
        if event.epoch and event.epoch != self._outcomes.epoch:
            # Another leader's grant of the same attempt: ours may be taken there.
            return
        if event.retry:
            entry.worker.muted = True
            self._outcomes.requeue(entry, now_s)
        else:
            self._outcomes.reject(entry, "unservable", event.reason, now_s)

    def finished(self, event: Finished, now_s: float) -> None:
        """The request is over, whoever ran it."""
        entry = self._ledger.entries.get(event.seq)
        self._outcomes.ended.add(event.seq, now_s)
        self._handoffs.over(event.seq)
        self._ledger.stray_ended(event.worker, event.seq)
        if entry is None:
            return
        self._stats.finished += 1
        if event.reason in (Reason.STOP, Reason.LENGTH):
            self._ledger.costs.learn(entry, event.output_tokens)
        elif event.reason is Reason.CANCELLED:
            self._outcomes.actions.append(Discard(entry.seq))
        self._ledger.settle(entry, event.output_tokens, event.cached_tokens, event.moved_bytes)
        elsewhere = entry.worker is not None and entry.worker.member != event.worker
        self._outcomes.end(entry, now_s, stray=elsewhere)

    def failed(self, event: Failed, now_s: float) -> None:
        entry = self._granted_to(event.worker, event.seq, event.stage)
        held = self._ledger.entries.get(event.seq)
        self._ledger.stray_ended(event.worker, event.seq)
        if entry is not None and entry.worker is not None and event.died:
            # The others that ran there are said to have failed next; they are judged together.
            others = list(entry.worker.book.values())
            self._outcomes.lose_with_worker(others, event.error, now_s, stray=False)
        elif entry is not None:
            self._outcomes.lose(entry, "failed", event.error, now_s, stray=False)
        elif (
            held is not None
            and held.place is Place.WAITING
            and held.holder is not None
            and held.holder.member == event.worker
        ):
            self._outcomes.lose(held, "failed", event.error, now_s)

    def _granted_to(self, worker: str, seq: int, stage: Stage) -> Entry | None:
        """The request, if it is granted to or running on that worker in that stage."""
        entry = self._ledger.entries.get(seq)
        if entry is None or entry.worker is None or entry.worker.member != worker or entry.stage is not stage:
            return None
        return entry
