"""The order of one stage: start-time fair queueing across tenants.

Goyal, Vin and Cheng, "Start-time Fair Queueing" (SIGCOMM 1996). A tenant's requests form a flow. The flow with the
least start tag is served next; serving a request of cost c moves its flow's tag on by c / weight. Virtual time v is
the largest start tag served so far, and an idle flow re-enters at v at least, so that idleness saves nothing up.
Costs are estimates: ``settle`` moves a tag by the difference once the real cost is known, as the token counters of
Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024, arXiv 2401.00588) do.

The bound. Of tenant f, per weight: let A be its largest real cost, E the largest lead by which a flow may be served
out of turn (``Order.lead`` with an SLO, else 0), and of its requests charged and not yet settled let U be the most by
which their real costs together exceed their charges, and O the most by which they fall short of them. Let R be f's
tag as if each real cost had been charged at once. R moves only when f is served or enters.

- R <= v + A + U + E: f is served at a tag of at most v, or v + E, which its request's real cost moves on, and the
  charges that are out may be too low by U. v never falls.
- R >= v - O: v rises only to the tag of the flow that is least, and a flow enters at v or above; from then on only
  charges that turn out too high take its tag back.

So in any interval in which f and g both wait and nothing stops either, what they are served per weight differs by at
most (A + U + O + E of f) + (A + U + O + E of g): of the pair's own quantities alone, whatever others do. With exact
estimates and no SLO that is the bound of Goyal's theorem 1. Counted when it is worked off and not when it is started,
service lags by what is in flight besides: I of f + I of g. With charges at the end, U = I, it has the form of the
VTC's 2 max(largest request, in flight). A flow is stopped while its head does not fit (for ``bypass_s`` at most), at
its own concurrency, or in the lane of the other class; requests that a new leader finds running are charged at once.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator
from typing import Generic

from llmserve.bus.flow.flows import Flow, Order, Share, T
from llmserve.bus.flow.leads import Leads


class FairQueue(Generic[T]):
    """Items of many tenants in fair order. Every operation takes O(log n)."""

    def __init__(
        self,
        share_of: Callable[[str], Share],
        tickets: Iterator[int] | None = None,
        order: Order | None = None,
    ) -> None:
        """``tickets`` must be shared by all queues that an item may stand in one after the other: an item that left
        a queue is known there by its old ticket, which no queue may give it again."""
        self._share_of = share_of
        self._tickets = tickets or itertools.count(1)
        self._order = order or Order()
        self._flows: dict[str, Flow[T]] = {}
        self._heap: list[tuple[float, bool, int, int, Flow[T]]] = []
        self._leads: Leads[T] = Leads(self._order.lead)
        self.virtual_time = 0.0
        """Start tag served last, in turn."""
        self.size = 0

    def push(self, item: T, cost: float = 0.0) -> None:
        """Queue the item, expected to cost ``cost``: or put it at the head of its tenant if it is paid."""
        flow = self._flow(item.tenant)
        if flow.size == 0:
            self._enter(flow)
        item.ticket = self._next()
        if item.paid:
            heapq.heappush(flow.paid, (item.seq, item.ticket, item))
        else:
            key = cost + self._order.aging * item.seen_s
            heapq.heappush(flow.shortest, (key, item.seq, item.ticket, item))
            flow.oldest.append((item.ticket, item))
        flow.size += 1
        self.size += 1
        if not flow.parked and (item.paid or not flow.indexed):
            self._index(flow)

    def remove(self, item: T) -> None:
        """Take a queued item out, wherever it stands."""
        flow = self._flows[item.tenant]
        item.ticket = 0
        flow.size -= 1
        self.size -= 1
        if flow.size == 0:
            self._empty(flow)
            return
        flow.sweep()
        if item.paid and flow.indexed:
            self._index(flow)

    def take(self, now_s: float) -> Flow[T] | None:
        """The flow whose turn it is, with its ``turn``; the caller must ``serve``, ``restore`` or ``park`` it."""
        flow = self._leads.take(now_s, self.virtual_time) if self._leads else None
        if flow is None:
            while self._heap:
                *_, version, first = heapq.heappop(self._heap)
                if first.stands(version):
                    flow = first
                    flow.leading = False
                    break
            else:
                return None
        flow.indexed = False
        flow.turn = flow.choose(now_s, self._order.promote_s)
        return flow

    def serve(self, flow: Flow[T], cost: float) -> T:
        """Remove the item whose turn it is in a flow that was taken, and charge ``cost`` (0 for what is paid)."""
        item, flow.turn = flow.turn, None
        assert item is not None, f"{flow.tenant} was not taken"
        item.ticket = 0
        flow.size -= 1
        self.size -= 1
        if cost > 0:
            if not flow.leading:
                self.virtual_time = max(self.virtual_time, flow.tag)
            flow.tag += cost / flow.weight
        if flow.size:
            flow.sweep()
            flow.order = self._next()
            self._index(flow)
        else:
            self._empty(flow)
        return item

    def restore(self, flow: Flow[T]) -> None:
        """Put a flow that was taken back where it was."""
        flow.turn = None
        if flow.size:
            self._index(flow)

    def park(self, flow: Flow[T]) -> None:
        """Leave a flow that was taken out of the order until ``unpark``: its own bound stops it."""
        flow.turn = None
        flow.parked = True

    def unpark(self, tenant: str) -> None:
        flow = self._flows.get(tenant)
        if flow is None or not flow.parked:
            return
        flow.parked = False
        if flow.size:
            self._enter(flow)
            self._index(flow)

    def settle(self, tenant: str, difference: float) -> None:
        """Correct what ``tenant`` was charged by ``difference``."""
        flow = self._flow(tenant)
        flow.tag += difference / flow.weight
        if flow.indexed and difference:
            self._index(flow)

    def charge(self, tenant: str, cost: float) -> None:
        """Charge for a request that was served without the queue."""
        flow = self._flow(tenant)
        if flow.size == 0:
            self._enter(flow)
        self.settle(tenant, cost)

    def all_parked(self) -> bool:
        """Whether nothing here may be served now: all that waits is stopped by its own tenant's bound."""
        return self._least() is None

    def sizes(self) -> Iterator[tuple[str, int]]:
        """(tenant, queued items) of every tenant that was ever here."""
        return ((flow.tenant, flow.size) for flow in self._flows.values())

    def items(self) -> Iterator[T]:
        """All queued items, in no order."""
        for flow in self._flows.values():
            yield from flow.live()

    def check(self) -> None:
        """Assert the invariants."""
        valid = [flow for *_, version, flow in self._heap if flow.stands(version)]
        assert len(valid) == len({id(flow) for flow in valid}), "a flow stands twice in the order"
        assert self.size == sum(flow.size for flow in self._flows.values()), "size is not the sum of the flows"
        leading = self._leads.flows()
        for flow in self._flows.values():
            live = list(flow.live())
            assert flow.size == len(live), f"{flow.tenant}: size {flow.size}, items {len(live)}"
            by_size = sum(1 for _, _, ticket, item in flow.shortest if ticket == item.ticket)
            by_age = sum(1 for ticket, item in flow.oldest if ticket == item.ticket)
            assert by_size == by_age, f"{flow.tenant}: {by_size} by size, {by_age} by age"
            assert flow.turn is None, f"{flow.tenant}: taken and never given back"
            assert flow.indexed == any(flow is other for other in valid), f"{flow.tenant}: index mark is wrong"
            assert flow.indexed == (flow.size > 0 and not flow.parked), f"{flow.tenant}: not in the order"
            if flow.indexed and flow.slo_s is not None and flow.first_paid() is None:
                assert any(flow is other for other in leading), f"{flow.tenant}: its SLO is forgotten"
            assert all(item.tenant == flow.tenant for item in live), f"{flow.tenant}: holds another's request"

    def _flow(self, tenant: str) -> Flow[T]:
        flow = self._flows.get(tenant)
        if flow is None:
            share = self._share_of(tenant)
            flow = self._flows[tenant] = Flow(tenant, share.weight, share.slo_s)
        return flow

    def _least(self) -> Flow[T] | None:
        """The flow whose turn is next."""
        heap = self._heap
        while heap:
            *_, version, flow = heap[0]
            if flow.stands(version):
                return flow
            heapq.heappop(heap)
        return None

    def _enter(self, flow: Flow[T]) -> None:
        flow.tag = max(flow.tag, self.virtual_time)
        flow.order = self._next()

    def _index(self, flow: Flow[T]) -> None:
        paid = bool(flow.paid) and flow.first_paid() is not None
        tag = min(flow.tag, self.virtual_time) if paid else flow.tag
        flow.version = self._next()
        flow.indexed = True
        heapq.heappush(self._heap, (tag, not paid, flow.order, flow.version, flow))
        if len(self._heap) > 2 * len(self._flows) + 64:
            self._heap = [entry for entry in self._heap if entry[4].stands(entry[3])]
            heapq.heapify(self._heap)
        if flow.slo_s is not None and (oldest := flow.first_come()) is not None:
            self._leads.add(flow, oldest.seen_s + flow.slo_s / 2)

    def _empty(self, flow: Flow[T]) -> None:
        flow.paid.clear()
        flow.shortest.clear()
        flow.oldest.clear()
        flow.indexed = False

    def _next(self) -> int:
        return next(self._tickets)
