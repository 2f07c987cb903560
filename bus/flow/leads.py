"""Flows with an SLO, which may go before their turn.

A flow whose oldest request has waited for half of its SLO does so while its tag is at most ``lead`` / weight ahead of
virtual time. It is charged as ever, so that it repays the lead by waiting later.
"""

from __future__ import annotations

import heapq
from typing import Generic

from llmserve.bus.flow.flows import Flow, T


class Leads(Generic[T]):
    """Flows by when their SLO calls. ``lead``: cost by which one of them may be ahead of its share."""

    def __init__(self, lead: float) -> None:
        self._lead = lead
        self._urgent: list[tuple[float, int, Flow[T]]] = []
        """By when half of the SLO has passed for their oldest item: (time, version, flow)."""
        self._indebted: list[tuple[float, int, Flow[T]]] = []
        """Urgent flows that are too far ahead, by the virtual time at which they are not."""
        self._sweep_at = 64

    def __bool__(self) -> bool:
        return bool(self._urgent or self._indebted)

    def add(self, flow: Flow[T], urgent_s: float) -> None:
        """From ``urgent_s`` on it may lead, unless its version has changed by then."""
        heapq.heappush(self._urgent, (urgent_s, flow.version, flow))
        if len(self._urgent) > self._sweep_at:
            self._urgent = [entry for entry in self._urgent if entry[2].stands(entry[1])]
            heapq.heapify(self._urgent)
            self._sweep_at = 2 * len(self._urgent) + 64

    def take(self, now_s: float, virtual_time: float) -> Flow[T] | None:
        """A flow that goes before its turn."""
        while self._urgent and self._urgent[0][0] <= now_s:
            _, version, flow = heapq.heappop(self._urgent)
            if flow.stands(version):
                heapq.heappush(self._indebted, (flow.tag - self._lead / flow.weight, version, flow))
        while self._indebted:
            ahead, version, flow = self._indebted[0]
            if flow.stands(version):
                if ahead > virtual_time:
                    return None
                flow.leading = flow.tag > virtual_time
                heapq.heappop(self._indebted)
                return flow
            heapq.heappop(self._indebted)
        return None

    def flows(self) -> list[Flow[T]]:
        """All that may lead, now or later."""
        return [flow for _, version, flow in self._urgent + self._indebted if flow.stands(version)]
