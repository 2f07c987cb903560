"""Decode workers that fetch the pages of a prompt while it is computed, so that only its end is left to fetch."""

from __future__ import annotations

from llmserve.bus.flow.actions import SendAhead
from llmserve.bus.flow.dispatch import Dispatcher
from llmserve.bus.flow.entry import ON_WORKER, Entry
from llmserve.bus.flow.ledger import Ledger
from llmserve.bus.flow.outcomes import Outcomes
from llmserve.bus.messages import Grant, Prefilling, Stage, encode


class Aheads:
    """Sets room aside at a decode worker with credit, and passes the offers of the prefill worker on to it.

    The room is given back with the request's place at its prefill worker, however that ends; once it is handed off it
    takes its turn for a decode worker like any other, and that one first.
    """

    def __init__(self, ledger: Ledger, outcomes: Outcomes, dispatcher: Dispatcher) -> None:
        self._ledger = ledger
        self._outcomes = outcomes
        self._dispatcher = dispatcher

    def prefilling(self, event: Prefilling, now_s: float) -> None:
        """Pages of a request are on offer; without a decode worker that has room they all come at the end."""
        entry = self._ledger.entries.get(event.seq)
        if entry is None or entry.attempt != event.attempt or entry.cancelled or entry.worker is None:
            return
        if entry.place not in ON_WORKER or entry.stage is not Stage.PREFILL or entry.worker.member != event.worker:
            return
        if entry.ahead is None or entry.ahead.gone:
            worker = self._dispatcher.choose_ahead(entry, entry.worker.beat.fingerprint, now_s)
            if worker is None:
                return
            self._ledger.reserve(entry, worker)
        assert entry.ahead is not None
        self._outcomes.actions.append(SendAhead(entry.ahead.member, self._grant_of(entry, event)))

    def _grant_of(self, entry: Entry, event: Prefilling) -> Grant:
        return Grant(
            epoch=self._outcomes.epoch,
            seq=entry.seq,
            tenant=entry.tenant,
            klass=entry.klass,
            stage=Stage.DECODE,
            attempt=entry.attempt,
            request=entry.data,
            handoff=encode(event),
            ahead=True,
        )
