"""The order of one stage: start-time fair queueing across tenants, FIFO inside a tenant.

Goyal, Vin and Cheng, "Start-time Fair Queueing" (SIGCOMM 1996). A tenant's requests form a flow. The flow with the
least start tag is served next; serving a request of cost c moves its flow's tag on by c / weight, and virtual time is
the start tag of the request served last. A flow that was idle re-enters at virtual time at the earliest, so idleness
saves nothing up. While two flows are backlogged and nothing blocks them, their service per weight differs by at most
the largest cost per weight of each. Costs are estimates: ``settle`` moves a tag by the difference once the real cost
is known, as the token counters of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024).
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar


class Queueable(Protocol):
    """What an item must have to be queued."""

    @property
    def seq(self) -> int: ...
    @property
    def tenant(self) -> str: ...

    paid: bool
    """Charged before: goes to the head of its tenant, and its tenant's turn is now."""
    ticket: int
    """The queue's own mark, 0 when not queued."""


T = TypeVar("T", bound=Queueable)


@dataclass(slots=True, eq=False)
class Flow(Generic[T]):
    """One tenant's requests in one stage."""

    tenant: str
    weight: float
    tag: float = 0.0
    """Start tag of the next request that is to be charged."""
    items: list[tuple[bool, int, int, T]] = field(default_factory=list)
    """Heap of (not paid, seq, ticket, item); an item whose ticket is another has left."""
    size: int = 0
    order: int = 0
    """Ties between tags go to the flow that waits longest for its turn."""
    version: int = 0
    """The entry in the queue's heap that counts is the one of this version."""
    indexed: bool = False
    parked: bool = False

    def head(self) -> T:
        while self.items[0][2] != self.items[0][3].ticket:
            heapq.heappop(self.items)
        return self.items[0][3]


class FairQueue(Generic[T]):
    """Items of many tenants in fair order. Every operation takes O(log n)."""

    def __init__(self, weight_of: Callable[[str], float], tickets: Iterator[int] | None = None) -> None:
        """``tickets`` must be shared by all queues that an item may stand in one after the other: an item that left
        a queue is known there by its old ticket, which no queue may give it again."""
        self._weight_of = weight_of
        self._tickets = tickets or itertools.count(1)
        self._flows: dict[str, Flow[T]] = {}
        self._heap: list[tuple[float, bool, int, int, Flow[T]]] = []
        self.virtual_time = 0.0
        self.size = 0

    def push(self, item: T) -> None:
        """Queue the item: at the end of its tenant's requests, or at their head if it is paid."""
        flow = self._flow(item.tenant)
        if flow.size == 0:
            self._enter(flow)
        item.ticket = self._next()
        heapq.heappush(flow.items, (not item.paid, item.seq, item.ticket, item))
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
            flow.items.clear()
            self._drop(flow)
            return
        if len(flow.items) > 2 * flow.size + 16:
            flow.items = [entry for entry in flow.items if entry[2] == entry[3].ticket]
            heapq.heapify(flow.items)
        if item.paid and flow.indexed:
            self._index(flow)

    def take(self) -> Flow[T] | None:
        """The flow whose turn it is; the caller must ``serve``, ``restore`` or ``park`` it."""
        while self._heap:
            *_, version, flow = heapq.heappop(self._heap)
            if version == flow.version and flow.indexed:
                flow.indexed = False
                return flow
        return None

    def serve(self, flow: Flow[T], cost: float) -> T:
        """Remove the head of a flow that was taken, and charge ``cost`` to it (0 for what is paid)."""
        _, _, _, item = heapq.heappop(flow.items)
        item.ticket = 0
        flow.size -= 1
        self.size -= 1
        if cost > 0:
            self.virtual_time = max(self.virtual_time, flow.tag)
            flow.tag += cost / flow.weight
        if flow.size:
            flow.order = self._next()
            self._index(flow)
        return item

    def restore(self, flow: Flow[T]) -> None:
        """Put a flow that was taken back where it was."""
        if flow.size:
            self._index(flow)

    def park(self, flow: Flow[T]) -> None:
        """Leave a flow that was taken out of the order until ``unpark``: its own bound stops it."""
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
        if flow.indexed:
            self._index(flow)

    def charge(self, tenant: str, cost: float) -> None:
        """Charge for a request that was served without the queue."""
        flow = self._flow(tenant)
        if flow.size == 0:
            self._enter(flow)
        self.settle(tenant, cost)

    def sizes(self) -> Iterator[tuple[str, int]]:
        """(tenant, queued items) of every tenant that was ever here."""
        return ((flow.tenant, flow.size) for flow in self._flows.values())

    def items(self) -> Iterator[T]:
        """All queued items, in no order."""
        for flow in self._flows.values():
            for _, _, ticket, item in flow.items:
                if ticket == item.ticket:
                    yield item

    def check(self) -> None:
        """Assert the invariants."""
        valid = [flow for *_, version, flow in self._heap if version == flow.version and flow.indexed]
        assert len(valid) == len({id(flow) for flow in valid}), "a flow stands twice in the order"
        assert self.size == sum(flow.size for flow in self._flows.values()), "size is not the sum of the flows"
        for flow in self._flows.values():
            live = [item for _, _, ticket, item in flow.items if ticket == item.ticket]
            assert flow.size == len(live), f"{flow.tenant}: size {flow.size}, items {len(live)}"
            assert flow.indexed == any(flow is other for other in valid), f"{flow.tenant}: index mark is wrong"
            assert flow.indexed == (flow.size > 0 and not flow.parked), f"{flow.tenant}: not in the order"
            assert all(item.tenant == flow.tenant for item in live), f"{flow.tenant}: holds another's request"

    def _flow(self, tenant: str) -> Flow[T]:
        flow = self._flows.get(tenant)
        if flow is None:
            flow = self._flows[tenant] = Flow(tenant, self._weight_of(tenant))
        return flow

    def _enter(self, flow: Flow[T]) -> None:
        flow.tag = max(flow.tag, self.virtual_time)
        flow.order = self._next()

    def _index(self, flow: Flow[T]) -> None:
        paid = flow.head().paid
        tag = min(flow.tag, self.virtual_time) if paid else flow.tag
        flow.version = self._next()
        flow.indexed = True
        heapq.heappush(self._heap, (tag, not paid, flow.order, flow.version, flow))
        if len(self._heap) > 2 * len(self._flows) + 64:
            self._heap = [entry for entry in self._heap if entry[3] == entry[4].version and entry[4].indexed]
            heapq.heapify(self._heap)

    def _drop(self, flow: Flow[T]) -> None:
        flow.indexed = False

    def _next(self) -> int:
        return next(self._tickets)
