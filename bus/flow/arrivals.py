"""The request stream: attempts that come, replace others, or turn out to be off it."""

from __future__ import annotations

from llmserve.bus.base import StoredRequest
from llmserve.bus.flow.actions import Discard
from llmserve.bus.flow.entry import ON_WORKER, Entry, Place
from llmserve.bus.flow.events import Checked, StreamRead
from llmserve.bus.flow.handoffs import Handoffs
from llmserve.bus.flow.ledger import Ledger
from llmserve.bus.flow.members import Members
from llmserve.bus.flow.outcomes import Outcomes
from llmserve.bus.messages import Cancel


class Arrivals:
    """Handles what the stream and the gateways say."""

    def __init__(self, ledger: Ledger, members: Members, outcomes: Outcomes, handoffs: Handoffs) -> None:
        self._ledger = ledger
        self._members = members
        self._outcomes = outcomes
        self._handoffs = handoffs

    def stored(self, stored: StoredRequest, now_s: float) -> None:
        """An attempt stands on the stream."""
        request, outcomes = stored.request, self._outcomes
        if stored.seq in self._ledger.entries or stored.seq in outcomes.ended:
            return
        current = self._ledger.by_request.get(request.request_id)
        if request.request_id in outcomes.cancelled or (current is not None and current.attempt >= request.attempt):
            outcomes.actions.append(Discard(stored.seq))
            return
        entry = Entry.of(stored, now_s, self._ledger.settings.inline_bytes)
        if current is not None:
            self._supersede(current, entry, now_s)
        self._ledger.add(entry)
        claim = self._members.take_claim(entry)
        if claim is not None:
            outcomes.adopt(entry, *claim, now_s)
        else:
            self._ledger.queue(entry, now_s)
        self._handoffs.request_known(entry.seq, now_s)

    def checked(self, checked: Checked, now_s: float) -> None:
        """The stream was asked about an attempt."""
        entry, outcomes = self._ledger.entries.get(checked.seq), self._outcomes
        if entry is None:
            return
        asked, entry.checking = entry.checking, False
        if checked.stored is False:
            self._ledger.settle(entry, 0, 0)
            outcomes.end(entry, now_s)
        elif checked.stored and asked and entry.place is Place.LOST:
            outcomes.notify_lost(entry, "still on the stream")
        elif checked.stored and asked and entry.place in ON_WORKER:
            outcomes.lose(entry, "inventory", "its worker does not know it", now_s)

    def read(self, read: StreamRead, now_s: float) -> None:
        """What is stored now, for a new leader, whose predecessor may have died in the middle of anything."""
        outcomes = self._outcomes
        for entry in list(self._ledger.entries.values()):
            if entry.seq in read.seqs:
                if entry.place is Place.LOST:
                    outcomes.notify_lost(entry, "told again by another router")
            elif entry.seq <= read.last_seq and entry.place not in ON_WORKER:
                self._ledger.settle(entry, 0, 0)
                outcomes.end(entry, now_s)
        outcomes.actions += [Discard(seq) for seq in sorted(read.seqs) if seq in outcomes.ended]

    def cancelled(self, event: Cancel, now_s: float) -> None:
        """Requests that nobody waits for any more, known or not."""
        by_gateway = event.epoch == 0
        for request_id in event.request_ids:
            if by_gateway:
                self._outcomes.cancelled.add(request_id, now_s)
            self._outcomes.rejections.answered(request_id)
            entry = self._ledger.by_request.get(request_id)
            if entry is not None:
                self._outcomes.cancel(entry, now_s, for_good=by_gateway)

    def _supersede(self, old: Entry, new: Entry, now_s: float) -> None:
        new.charges, old.charges = old.charges, []
        self._outcomes.end(old, now_s, stray=True)
        self._outcomes.actions.append(Discard(old.seq))
