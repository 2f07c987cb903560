"""The router's decisions, without I/O: events in, actions out, the same for the same history."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from llmserve.bus.base import StoredRequest
from llmserve.bus.flow.actions import Action, SendGrant
from llmserve.bus.flow.ahead import Aheads
from llmserve.bus.flow.arrivals import Arrivals
from llmserve.bus.flow.dispatch import Dispatcher, Granted
from llmserve.bus.flow.entry import Entry
from llmserve.bus.flow.events import Absent, Checked, Event, MemberLost, NoResponders, Reconnected, StreamRead, Tick
from llmserve.bus.flow.handoffs import Handoffs
from llmserve.bus.flow.ledger import Ledger
from llmserve.bus.flow.locality import Locality
from llmserve.bus.flow.members import Members
from llmserve.bus.flow.outcomes import Outcomes
from llmserve.bus.flow.placement import ByLocality, Placement
from llmserve.bus.flow.presence import Presence
from llmserve.bus.flow.progress import Progress
from llmserve.bus.flow.settings import RouterSettings
from llmserve.bus.flow.stats import Stats
from llmserve.bus.flow.whereabouts import Whereabouts
from llmserve.bus.messages import (
    Accepted,
    Cancel,
    Failed,
    Finished,
    Grant,
    HandedOff,
    Heartbeat,
    KvEvents,
    Prefilling,
    Refused,
    encode,
)


class RouterCore:
    """One deployment's router. ``handle`` takes what happened, ``dispatch`` grants what can be granted.

    Times are seconds of any clock that never goes back. The order of calls and ``rng`` decide everything. The
    handlers of the events stand in modules of their own and share the ledger and the outcomes.
    """

    def __init__(self, settings: RouterSettings, rng: random.Random, placement: Placement | None = None) -> None:
        """``placement``: by locality if not given."""
        self.settings = settings
        self.stats = Stats()
        self.ledger = Ledger(settings)
        self.members = Members(self.ledger)
        self._outcomes = Outcomes(self.ledger, self.stats)
        self.locality = Locality(settings.index_blocks)
        self._dispatcher = Dispatcher(self.ledger, rng, placement or ByLocality(self.locality))
        handoffs = Handoffs(self.ledger, self._outcomes)
        aheads = Aheads(self.ledger, self._outcomes, self._dispatcher)
        arrivals = Arrivals(self.ledger, self.members, self._outcomes, handoffs)
        progress = Progress(self.ledger, self._outcomes, handoffs, self.stats)
        presence = Presence(self.ledger, self.members, self._outcomes, handoffs, self.stats)
        whereabouts = Whereabouts(self.locality, self.members, self._outcomes)
        self._also: dict[type, Callable[[Any, float], None]] = {
            Heartbeat: whereabouts.heartbeat,
            MemberLost: whereabouts.member_lost,
            Tick: whereabouts.tick,
        }
        """What else an event means, beyond its handler."""
        self._handlers: dict[type, Callable[[Any, float], None]] = {
            StoredRequest: arrivals.stored,
            Checked: arrivals.checked,
            StreamRead: arrivals.read,
            Cancel: arrivals.cancelled,
            Accepted: progress.accepted,
            Refused: progress.refused,
            Finished: progress.finished,
            Failed: progress.failed,
            Prefilling: aheads.prefilling,
            HandedOff: handoffs.handed_off,
            Heartbeat: presence.heartbeat,
            KvEvents: whereabouts.told,
            NoResponders: presence.no_responders,
            MemberLost: presence.member_lost,
            Absent: presence.absent,
            Reconnected: presence.reconnected,
            Tick: presence.tick,
        }

    @property
    def router(self) -> str:
        """Member id of this leader."""
        return self._outcomes.router

    @property
    def epoch(self) -> int:
        """Of this leadership; 0 before ``begin``."""
        return self._outcomes.epoch

    def knows(self, seq: int) -> bool:
        """Whether the attempt is known, or known to be over."""
        return seq in self.ledger.entries or seq in self._outcomes.ended

    def begin(self, router: str, epoch: int) -> None:
        """Lead from now on, under ``epoch``."""
        self._outcomes.lead(router, epoch)

    def handle(self, event: Event, now_s: float) -> list[Action]:
        """Take one event in; O(log requests), for heartbeats linear in their inventory. ``dispatch`` comes next."""
        self._handlers[type(event)](event, now_s)
        if (also := self._also.get(type(event))) is not None:
            also(event, now_s)
        return self._outcomes.take_actions()

    def dispatch(self, now_s: float) -> list[Action]:
        """Grant all that fits, in fair order. One call may follow any number of events."""
        for decision in self._dispatcher.dispatch(now_s):
            if isinstance(decision, Granted):
                self.stats.grants[decision.entry.stage] += 1
                grant = self._grant_of(decision.entry)
                self._outcomes.actions.append(SendGrant(decision.worker.member, grant, decision.waited_s))
            else:
                self._outcomes.reject(decision.entry, "unservable", decision.message, now_s)
        return self._outcomes.take_actions()

    @property
    def wake_s(self) -> float | None:
        """When to ``dispatch`` again though nothing happens before; None: only after the next event."""
        return self._dispatcher.wake_s

    def check(self) -> None:
        """Assert every invariant; linear in all that is known."""
        self.ledger.check()
        self.locality.index.check()

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
