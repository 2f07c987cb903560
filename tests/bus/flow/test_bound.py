"""The bound of fairness across tenants that ``bus/flow/queue.py`` derives, on random histories.

``LLMSERVE_FLOW_HISTORIES`` sets how many histories it is tried on (10,000 for a full run).
"""

from __future__ import annotations

import itertools
import math
import os
import random
from collections import deque
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve.bus.flow.flows import Order, Share
from llmserve.bus.flow.queue import FairQueue

HISTORIES = int(os.environ.get("LLMSERVE_FLOW_HISTORIES", "200"))
ROUNDING = 1e-6


@dataclass(eq=False)
class Item:
    seq: int
    tenant: str
    cost: float
    """Real, as ``estimate`` is what is charged at the start."""
    estimate: float
    seen_s: float
    paid: bool = False
    ticket: int = 0


@dataclass
class Tenant:
    """What the bound says about one tenant is made of; all per weight, and the largest so far."""

    weight: float
    sizes: tuple[float, float]
    slo_s: float | None
    most_running: int
    lead: float
    started: float = 0.0
    """Real cost of all that was started."""
    done: float = 0.0
    queued: int = 0
    waiting: deque[Item] = field(default_factory=deque)
    """In the order of arrival; those with no ticket have been started."""
    running: int = 0
    parked: bool = False
    error: float = 0.0
    """Real costs over charges, of what is charged and not settled."""
    flying: float = 0.0
    largest: float = 0.0
    most_over: float = 0.0
    most_under: float = 0.0
    most_flying: float = 0.0

    @property
    def bound(self) -> float:
        return self.largest + self.most_under + self.most_over + self.lead

    @property
    def waits(self) -> bool:
        return self.queued > 0 and not self.parked

    def oldest(self) -> Item | None:
        while self.waiting and not self.waiting[0].ticket:
            self.waiting.popleft()
        return self.waiting[0] if self.waiting else None

    def charged(self, item: Item) -> None:
        self.started += item.cost / self.weight
        self.flying += item.cost / self.weight
        self.error += (item.cost - item.estimate) / self.weight
        self.largest = max(self.largest, item.cost / self.weight)
        self.look()

    def settled(self, item: Item) -> None:
        self.done += item.cost / self.weight
        self.flying -= item.cost / self.weight
        self.error -= (item.cost - item.estimate) / self.weight
        self.look()

    def look(self) -> None:
        self.most_under, self.most_over = max(self.most_under, self.error), max(self.most_over, -self.error)
        self.most_flying = max(self.most_flying, self.flying)


@dataclass
class Window:
    """While two tenants both wait: the range of the difference of their services, started and done."""

    low: list[float] = field(default_factory=lambda: [math.inf, math.inf])
    high: list[float] = field(default_factory=lambda: [-math.inf, -math.inf])

    def see(self, one: Tenant, other: Tenant) -> tuple[float, float]:
        """The largest lag in any interval of it so far, started and done."""
        for place, difference in enumerate((one.started - other.started, one.done - other.done)):
            self.low[place] = min(self.low[place], difference)
            self.high[place] = max(self.high[place], difference)
        return self.high[0] - self.low[0], self.high[1] - self.low[1]


class History:
    """A few tenants of unequal weights, sizes and SLOs on a few servers; estimates that err, grants that return."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        lead = rng.choice((50.0, 3000.0))
        self.tenants: dict[str, Tenant] = {}
        for number in range(rng.randint(2, 6)):
            weight, slo_s = rng.choice((0.5, 1.0, 1.0, 2.0, 4.0)), rng.choice((None, None, None, 2.0))
            sizes = rng.choice(((1, 10), (100, 100), (5, 2000), (300, 900)))
            most_running = rng.choice((1, 99, 99, 99))
            self.tenants[f"t{number}"] = Tenant(weight, sizes, slo_s, most_running, lead / weight if slo_s else 0.0)
        self.servers = rng.choice((1, 2, 4, 8))
        self.errors = rng.choice(((1.0,), (0.3, 1.0, 1.0, 2.0), (0.1, 10.0), (10.0,)))
        self.order = Order(aging=rng.choice((0.0, 10.0, 1000.0)), promote_s=rng.choice((0.5, 20.0)), lead=lead)
        self.queue: FairQueue[Item] = FairQueue(self.share, order=self.order)
        self.running: list[Item] = []
        self.windows: dict[tuple[str, str], Window] = {}
        self.seq = 0
        self.started = 0.0
        """Real cost of all that was started."""
        self.overdue: dict[str, tuple[int, float]] = {}
        """The oldest request of a tenant, once it is older than ``promote_s``: and what was started by then."""
        self.worst = [0.0, 0.0, 0.0]
        """Over its bound at its worst: the lag of what was started, of what was done, and what was started while the
        oldest request of a tenant was overdue."""

    def share(self, name: str) -> Share:
        return Share(self.tenants[name].weight, self.tenants[name].slo_s)

    def live(self, steps: int) -> list[float]:
        for step in range(steps):
            now_s, dice = 0.1 * step, self.rng.random()
            if dice < 0.5:
                self.arrive(now_s)
            elif self.running and dice < 0.95:
                self.finish()
            elif self.running:
                self.give_back()
            while len(self.running) < self.servers and self.start(now_s):
                self.look(now_s)
            self.look(now_s)
        return self.worst

    def arrive(self, now_s: float) -> None:
        name = self.rng.choice(list(self.tenants))
        tenant = self.tenants[name]
        for _ in range(self.rng.choice((1, 1, 5, 20))):
            self.seq += 1
            cost = self.rng.uniform(*tenant.sizes)
            item = Item(self.seq, name, cost, cost * self.rng.choice(self.errors), now_s)
            self.queue.push(item, item.estimate)
            tenant.waiting.append(item)
            tenant.queued += 1

    def start(self, now_s: float) -> bool:
        flow = self.queue.take(now_s)
        if flow is None:
            return False
        item, tenant = flow.turn, self.tenants[flow.tenant]
        assert item is not None
        if tenant.running >= tenant.most_running:
            tenant.parked = True
            self.queue.park(flow)
            return True
        self.queue.serve(flow, 0.0 if item.paid else item.estimate)
        tenant.queued -= 1
        tenant.running += 1
        if not item.paid:
            tenant.charged(item)
            self.started += item.cost
        self.running.append(item)
        return True

    def stop(self) -> tuple[Item, Tenant]:
        item = self.running.pop(self.rng.randrange(len(self.running)))
        tenant = self.tenants[item.tenant]
        tenant.running -= 1
        return item, tenant

    def finish(self) -> None:
        item, tenant = self.stop()
        self.queue.settle(item.tenant, item.cost - item.estimate)
        tenant.settled(item)
        self.unpark(tenant, item.tenant)

    def give_back(self) -> None:
        """A grant that was not run returns to the head; it was charged and is not charged again."""
        item, tenant = self.stop()
        item.paid = True
        self.queue.push(item)
        tenant.queued += 1
        self.unpark(tenant, item.tenant)

    def unpark(self, tenant: Tenant, name: str) -> None:
        tenant.parked = False
        self.queue.unpark(name)

    def look(self, now_s: float) -> None:
        for name, tenant in self.tenants.items():
            self.look_at_oldest(name, tenant, now_s)
        for one, other in itertools.combinations(self.tenants, 2):
            if not (self.tenants[one].waits and self.tenants[other].waits):
                self.windows.pop((one, other), None)
                continue
            self.compare(one, other)

    def look_at_oldest(self, name: str, tenant: Tenant, now_s: float) -> None:
        item = tenant.oldest()
        if tenant.parked or item is None or now_s - item.seen_s < self.order.promote_s:
            self.overdue.pop(name, None)
            return
        seq, before = self.overdue.get(name, (0, 0.0))
        if seq != item.seq:
            self.overdue[name] = (item.seq, self.started)
            return
        allowed = sum(other.weight * (tenant.bound + other.bound) for other in self.tenants.values())
        self.worst[2] = max(self.worst[2], (self.started - before) / (allowed + ROUNDING))

    def compare(self, one: str, other: str) -> None:
        first, second = self.tenants[one], self.tenants[other]
        lags = self.windows.setdefault((one, other), Window()).see(first, second)
        bound = first.bound + second.bound
        bounds = bound, bound + first.most_flying + second.most_flying
        for place, (lag, allowed) in enumerate(zip(lags, bounds, strict=True)):
            if lag > ROUNDING:
                self.worst[place] = max(self.worst[place], lag / (allowed + ROUNDING))


@settings(max_examples=HISTORIES, deadline=None)
@given(st.integers(0, 1 << 40))
def test_services_of_two_that_wait_keep_within_the_bound_and_so_does_what_the_oldest_request_waits_for(
    seed: int,
) -> None:
    started, done, overdue = History(seed).live(250)
    assert started <= 1.0
    assert done <= 1.0
    assert overdue <= 1.0


def test_the_bounds_are_tight_enough_to_be_approached() -> None:
    started, done, overdue = map(max, zip(*(History(seed).live(250) for seed in range(50)), strict=True))
    assert started > 0.9
    assert done > 0.6
    assert overdue > 0.2
