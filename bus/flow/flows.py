"""One tenant's requests in one stage: shortest first with aging.

Least key first, where key = expected cost + aging x time of arrival. Since all keys of a flow lose ``aging`` per
second of waiting alike, this is "expected cost minus aging x waiting time" and never has to be sorted again (SRPT:
Schrage 1968). A request that has waited for ``promote_s`` goes first whatever its size.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
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
    oldest: list[tuple[int, T]] = field(default_factory=list)
    """The same items as (ticket, item), in the order in which they came. Short and one of thousands: a deque would
    take ten times the memory, which is what is slow about many tenants."""
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

    def stands(self, version: int) -> bool:
        """Whether an entry of ``version`` in a heap is the one that counts."""
        return self.indexed and version == self.version

    def first_paid(self) -> T | None:
        paid = self.paid
        while paid and paid[0][1] != paid[0][2].ticket:
            heapq.heappop(paid)
        return paid[0][2] if paid else None

    def first_come(self) -> T | None:
        oldest = self.oldest
        left = 0
        while left < len(oldest) and oldest[left][0] != oldest[left][1].ticket:
            left += 1
        if left:
            del oldest[:left]
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
            self.oldest = [entry for entry in self.oldest if entry[0] == entry[1].ticket]
        if len(self.paid) > 2 * self.size + 16:
            self.paid = [entry for entry in self.paid if entry[1] == entry[2].ticket]
            heapq.heapify(self.paid)

    def live(self) -> Iterator[T]:
        """All its items, in no order."""
        yield from (item for _, ticket, item in self.paid if ticket == item.ticket)
        yield from (item for ticket, item in self.oldest if ticket == item.ticket)
