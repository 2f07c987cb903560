"""Hears where pages are, asks for what it missed, and forgets members that are gone."""

from __future__ import annotations

from llmserve.bus.flow.actions import AskSnapshot
from llmserve.bus.flow.events import MemberLost, Tick
from llmserve.bus.flow.locality import Locality
from llmserve.bus.flow.members import Members
from llmserve.bus.flow.outcomes import Outcomes
from llmserve.bus.messages import Heartbeat, KvEvents


class Whereabouts:
    """Handles what members, workers and the kv role alike, say about their pages."""

    def __init__(self, locality: Locality, members: Members, outcomes: Outcomes) -> None:
        self._locality = locality
        self._members = members
        self._outcomes = outcomes

    def told(self, event: KvEvents, now_s: float) -> None:
        self._locality.hear(event, now_s)
        self._ask(now_s)

    def heartbeat(self, beat: Heartbeat, now_s: float) -> None:
        self._locality.beat(beat, now_s)
        self._ask(now_s)

    def member_lost(self, event: MemberLost, now_s: float) -> None:
        self._locality.forget(event.member)

    def tick(self, event: Tick, now_s: float) -> None:
        """Silence counts from the last reconnect of the bus at the earliest, as it does for all members."""
        if not self._members.returning(now_s):
            self._locality.expire(now_s - self._members.timeout_s)
        self._ask(now_s)

    def _ask(self, now_s: float) -> None:
        self._outcomes.actions += [AskSnapshot(member) for member in self._locality.due(now_s)]
