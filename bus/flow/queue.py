"""The order of one stage: start-time fair queueing across tenants, shortest first with aging inside a tenant.

Across tenants: Goyal, Vin and Cheng, "Start-time Fair Queueing" (SIGCOMM 1996). A tenant's requests form a flow. The
flow with the least start tag is served next; serving a request of cost c moves its flow's tag on by c / weight.
Costs are estimates: ``settle`` moves a tag by the difference once the real cost is known, as the token counters of
Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024, arXiv 2401.00588) do. From there also comes
where an idle flow re-enters: no lower than the least tag of the flows that are backlogged, or than the start tag
that was served last if that is less, so that idleness saves nothing up and estimates that were too high do not push
a newcomer back. While two flows are backlogged and nothing blocks them, their
charges per weight differ by at most the largest charge per weight of each.

Inside a tenant: least key first, where key = expected cost + aging x time of arrival. Since all keys of a flow lose
``aging`` per second of waiting alike, this is "expected cost minus aging x waiting time" and never has to be sorted
again (SRPT: Schrage 1968). A request that has waited for ``promote_s`` goes first whatever its size.

A flow with an SLO whose oldest request has waited for half of it goes before its turn while its tag is at most
``lead`` / weight ahead of virtual time. It is charged as ever, so that it repays the lead by waiting later.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar


class Queueable(Protocol):
    """What an item must have to be queued."""

    @property
    def seq(self) -> int: ...
    @property
    def tenant(self) -> str: ...
    @property
    def seen_s(self) -> float: ...

    paid: bool
    """Charged before: goes to the head of its tenant, and its tenant's turn is now."""
    ticket: int
    """The queue's own mark, 0 when not queued."""


T = TypeVar("T", bound=Queueable)


@dataclass(frozen=True, slots=True)
class Share:
    """What a tenant is due."""

    weight: float = 1.0
    slo_s: float | None = None


@dataclass(frozen=True, slots=True)
class Order:
    """How a queue orders its items."""

    aging: float = 100.0
    """Cost that a second of waiting outweighs inside a tenant."""
    promote_s: float = 24.0
    """From this age on an item goes first inside its tenant."""
    lead: float = 8192.0
    """Cost by which a flow that would miss its SLO may be ahead of its share."""


@dataclass(slots=True, eq=False)
class Flow(Generic[T]):
    """One tenant's requests in one stage."""

    tenant: str
    weight: float
    slo_s: float | None
    tag: float = 0.0
    """Start tag of the next request that is to be charged."""
    paid: list[tuple[int, int, T]] = field(default_factory=list)
    """Heap of (seq, ticket, item); here and below an item whose ticket is another has left."""
    shortest: list[tuple[float, int, int, T]] = field(default_factory=list)
    """Heap of (key, seq, ticket, item)."""
    oldest: deque[tuple[int, T]] = field(default_factory=deque)
    """The same items as (ticket, item), in the order in which they came."""
    size: int = 0
    order: int = 0
    """Ties between tags go to the flow that waits longest for its turn."""
    version: int = 0
    """The entry in the queue's heaps that counts is the one of this version."""
    indexed: bool = False
    parked: bool = False
    leading: bool = False
    """Taken before its turn."""
    turn: T | None = None
    """The item to be served, while the flow is taken."""

    def first_paid(self) -> T | None:
        paid = self.paid
        while paid and paid[0][1] != paid[0][2].ticket:
            heapq.heappop(paid)
        return paid[0][2] if paid else None

    def first_come(self) -> T | None:
        oldest = self.oldest
        while oldest and oldest[0][0] != oldest[0][1].ticket:
            oldest.popleft()
        return oldest[0][1] if oldest else None

    def choose(self, now_s: float, promote_s: float) -> T:
        """The item whose turn it is; the flow must not be empty."""
        item = self.first_paid()
        if item is not None:
            return item
        oldest = self.first_come()
        assert oldest is not None, f"{self.tenant}: empty"
        waited_s = now_s - oldest.seen_s
        if waited_s >= promote_s or (self.slo_s is not None and waited_s >= self.slo_s / 2):
            return oldest
        shortest = self.shortest
        while shortest[0][2] != shortest[0][3].ticket:
            heapq.heappop(shortest)
        return shortest[0][3]

    def sweep(self) -> None:
        """Drop what has left, once it is most of what is stored."""
        if len(self.shortest) > 2 * self.size + 16:
            self.shortest = [entry for entry in self.shortest if entry[2] == entry[3].ticket]
            heapq.heapify(self.shortest)
        if len(self.oldest) > 2 * self.size + 16:
            self.oldest = deque(entry for entry in self.oldest if entry[0] == entry[1].ticket)
        if len(self.paid) > 2 * self.size + 16:
            self.paid = [entry for entry in self.paid if entry[1] == entry[2].ticket]
            heapq.heapify(self.paid)

    def live(self) -> Iterator[T]:
        """All its items, in no order."""
        yield from (item for _, ticket, item in self.paid if ticket == item.ticket)
        yield from (item for ticket, item in self.oldest if ticket == item.ticket)


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
        self._urgent: list[tuple[float, int, Flow[T]]] = []
        """Flows with an SLO by when half of it has passed for their oldest item: (time, version, flow)."""
        self._indebted: list[tuple[float, int, Flow[T]]] = []
        """Urgent flows that are too far ahead, by the virtual time at which they are not."""
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
        flow = self._take_urgent(now_s)
        if flow is None:
            while self._heap:
                *_, version, first = heapq.heappop(self._heap)
                if version == first.version and first.indexed:
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
        valid = [flow for *_, version, flow in self._heap if version == flow.version and flow.indexed]
        assert len(valid) == len({id(flow) for flow in valid}), "a flow stands twice in the order"
        assert self.size == sum(flow.size for flow in self._flows.values()), "size is not the sum of the flows"
        waiting = [(version, flow) for _, version, flow in self._urgent + self._indebted]
        urgent = {id(flow) for version, flow in waiting if version == flow.version}
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
                assert id(flow) in urgent, f"{flow.tenant}: its SLO is forgotten"
            assert all(item.tenant == flow.tenant for item in live), f"{flow.tenant}: holds another's request"

    def _flow(self, tenant: str) -> Flow[T]:
        flow = self._flows.get(tenant)
        if flow is None:
            share = self._share_of(tenant)
            flow = self._flows[tenant] = Flow(tenant, share.weight, share.slo_s)
        return flow

    def _take_urgent(self, now_s: float) -> Flow[T] | None:
        """A flow that goes before its turn for its SLO."""
        if not self._urgent and not self._indebted:
            return None
        while self._urgent and self._urgent[0][0] <= now_s:
            _, version, flow = heapq.heappop(self._urgent)
            if version == flow.version and flow.indexed:
                heapq.heappush(self._indebted, (flow.tag - self._order.lead / flow.weight, version, flow))
        while self._indebted:
            ahead, version, flow = self._indebted[0]
            if version == flow.version and flow.indexed:
                if ahead > self._now():
                    return None
                flow.leading = flow.tag > self._now()
                heapq.heappop(self._indebted)
                return flow
            heapq.heappop(self._indebted)
        return None

    def _now(self) -> float:
        """Virtual time for one that enters: the least tag of those that may be served."""
        flow = self._least()
        return self.virtual_time if flow is None else min(flow.tag, self.virtual_time)

    def _least(self) -> Flow[T] | None:
        """The flow whose turn is next."""
        heap = self._heap
        while heap:
            *_, version, flow = heap[0]
            if version == flow.version and flow.indexed:
                return flow
            heapq.heappop(heap)
        return None

    def _enter(self, flow: Flow[T]) -> None:
        flow.tag = max(flow.tag, self._now())
        flow.order = self._next()

    def _index(self, flow: Flow[T]) -> None:
        paid = bool(flow.paid) and flow.first_paid() is not None
        tag = min(flow.tag, self.virtual_time) if paid else flow.tag
        flow.version = self._next()
        flow.indexed = True
        heapq.heappush(self._heap, (tag, not paid, flow.order, flow.version, flow))
        if len(self._heap) > 2 * len(self._flows) + 64:
            self._heap = [entry for entry in self._heap if entry[3] == entry[4].version and entry[4].indexed]
            heapq.heapify(self._heap)
        if flow.slo_s is not None and (oldest := flow.first_come()) is not None:
            heapq.heappush(self._urgent, (oldest.seen_s + flow.slo_s / 2, flow.version, flow))
            if len(self._urgent) > 2 * len(self._flows) + 64:
                self._urgent = [entry for entry in self._urgent if entry[1] == entry[2].version and entry[2].indexed]
                heapq.heapify(self._urgent)

    def _empty(self, flow: Flow[T]) -> None:
        flow.paid.clear()
        flow.shortest.clear()
        flow.oldest.clear()
        flow.indexed = False

    def _next(self) -> int:
        return next(self._tickets)
