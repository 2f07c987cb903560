"""Handoffs that arrive, some of them before what they are about is known."""

from __future__ import annotations

from llmserve.bus.flow.credits import WorkerState
from llmserve.bus.flow.entry import ON_WORKER, Entry, Place
from llmserve.bus.flow.ledger import Ledger
from llmserve.bus.flow.outcomes import Outcomes
from llmserve.bus.messages import HandedOff, Stage


class Handoffs:
    """Moves a request on to the decode stage once its request, its worker and its handoff are all known."""

    def __init__(self, ledger: Ledger, outcomes: Outcomes) -> None:
        self._ledger = ledger
        self._outcomes = outcomes
        self._early: dict[int, tuple[HandedOff, float]] = {}
        """Handoffs whose request or worker is not known yet, and when they came."""

    def handed_off(self, event: HandedOff, now_s: float) -> None:
        """A prefill worker holds the pages of a request."""
        if event.seq in self._outcomes.ended:
            return
        entry, holder = self._ledger.entries.get(event.seq), self._ledger.workers.get(event.worker)
        if entry is None or holder is None:
            self._early[event.seq] = (event, now_s)
        elif entry.attempt == event.attempt and not entry.cancelled:
            self._wait(entry, holder, event, now_s, now_s)

    def request_known(self, seq: int, now_s: float) -> None:
        """Its handoff may have come before it."""
        event, came_s = self._early.get(seq, (None, 0.0))
        if event is None:
            return
        entry, holder = self._ledger.entries.get(seq), self._ledger.workers.get(event.worker)
        if entry is not None and holder is not None:
            del self._early[seq]
            if entry.attempt == event.attempt and not entry.cancelled:
                self._wait(entry, holder, event, came_s, now_s)

    def worker_known(self, member: str, now_s: float) -> None:
        """Its handoffs may have come before its first heartbeat."""
        for seq in [seq for seq, (event, _) in self._early.items() if event.worker == member]:
            self.request_known(seq, now_s)

    def over(self, seq: int) -> None:
        """The request ended."""
        self._early.pop(seq, None)

    def forget(self, now_s: float) -> None:
        """Drop those whose lease has passed."""
        for seq, (event, came_s) in list(self._early.items()):
            if came_s + event.lease_s <= now_s:
                del self._early[seq]

    def _wait(self, entry: Entry, holder: WorkerState, event: HandedOff, sent_s: float, now_s: float) -> None:
        prefilling = entry.place in ON_WORKER and entry.stage is Stage.PREFILL and entry.worker is holder
        again = entry.place is Place.WAITING and entry.holder is holder
        if not (prefilling or again or entry.place is Place.QUEUED):
            return
        self._ledger.wait(entry, event, holder, sent_s + self._ledger.settings.usable_s(event.lease_s), now_s)
