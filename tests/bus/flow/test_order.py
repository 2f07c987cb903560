"""Specification of the order inside a tenant, of SLO leads, and of the bound across tenants, on random histories.

``LLMSERVE_FLOW_HISTORIES`` sets how many histories the bound is tried on (10,000 for a full run).
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve.bus.flow.flows import Order, Share
from llmserve.bus.flow.queue import FairQueue

HISTORIES = int(os.environ.get("LLMSERVE_FLOW_HISTORIES", "300"))


@dataclass(eq=False)
class Item:
    seq: int
    tenant: str
    cost: float = 1.0
    """Real cost."""
    seen_s: float = 0.0
    paid: bool = False
    ticket: int = 0
    estimate: float = 1.0


def serve(queue: FairQueue[Item], now_s: float = 0.0) -> Item:
    flow = queue.take(now_s)
    assert flow is not None
    item = flow.turn
    assert item is not None
    queue.serve(flow, item.cost)
    queue.check()
    return item


def test_the_shortest_goes_first_inside_a_tenant() -> None:
    queue: FairQueue[Item] = FairQueue(lambda _: Share())
    for seq, cost in enumerate((500, 20, 300, 10)):
        queue.push(Item(seq, "a", cost), cost)
    assert [serve(queue).cost for _ in range(4)] == [10, 20, 300, 500]


def test_waiting_outweighs_size_at_the_rate_of_aging() -> None:
    queue: FairQueue[Item] = FairQueue(lambda _: Share(), order=Order(aging=100.0, promote_s=1000.0))
    queue.push(Item(1, "a", 500, seen_s=0.0), 500)
    queue.push(Item(2, "a", 100, seen_s=3.9), 100)
    queue.push(Item(3, "a", 100, seen_s=4.1), 100)
    assert [serve(queue, 5.0).seq for _ in range(3)] == [2, 1, 3]


def test_from_its_promotion_on_the_oldest_goes_first_whatever_its_size() -> None:
    queue: FairQueue[Item] = FairQueue(lambda _: Share(), order=Order(aging=0.0, promote_s=10.0))
    queue.push(Item(1, "a", 10_000, seen_s=0.0), 10_000)
    for seq in range(2, 6):
        queue.push(Item(seq, "a", 1, seen_s=9.0), 1)
    assert [serve(queue, 9.9).seq, serve(queue, 10.0).seq, serve(queue, 10.0).seq] == [2, 1, 3]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 1 << 30))
def test_nothing_of_a_tenant_that_came_later_is_served_before_what_was_promoted(seed: int) -> None:
    rng = random.Random(seed)
    queue: FairQueue[Item] = FairQueue(lambda _: Share(), order=Order(aging=5.0, promote_s=3.0))
    waiting: list[Item] = []
    now_s = 0.0
    for seq in range(120):
        now_s += rng.expovariate(2.0)
        if rng.random() < 0.6 or not waiting:
            item = Item(seq, rng.choice("ab"), rng.choice((1, 5, 200)), seen_s=now_s)
            queue.push(item, item.cost)
            waiting.append(item)
        else:
            served = serve(queue, now_s)
            waiting.remove(served)
            overdue = [i for i in waiting if i.tenant == served.tenant and now_s - i.seen_s >= 3.0]
            assert all(served.seen_s <= item.seen_s for item in overdue)


class Bound:
    """The service of backlogged tenants against the bound, in a history with a few servers.

    Service counts real costs when a request is over. The bound is that of Sheng et al. (arXiv 2401.00588): twice the
    largest request cost, and what is in flight, all per weight.
    """

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.names = [f"t{number}" for number in range(rng.randint(2, 6))]
        self.weights = {name: rng.choice((0.5, 1.0, 1.0, 2.0, 4.0)) for name in self.names}
        self.sizes = {name: rng.choice(((1, 10), (100, 100), (5, 2000), (300, 900))) for name in self.names}
        self.servers = rng.choice((1, 2, 4, 8))
        self.order = Order(aging=rng.choice((0.0, 10.0, 1000.0)), promote_s=rng.choice((0.5, 20.0)), lead=0.0)
        self.queue: FairQueue[Item] = FairQueue(lambda name: Share(self.weights[name]), order=self.order)
        self.running: list[Item] = []
        self.queued = dict.fromkeys(self.names, 0)
        self.service = dict.fromkeys(self.names, 0.0)
        self.since: dict[str, tuple[int, dict[str, float]]] = {}
        """When a tenant's present backlog began, and the service of each tenant then."""
        self.largest = dict.fromkeys(self.names, 0.0)
        self.most_in_flight = 0.0
        """Per weight, of all tenants together."""
        self.seq = 0
        self.worst = 0.0
        """Lag over the bound, at its worst."""

    def live(self, steps: int) -> float:
        for step in range(steps):
            if self.rng.random() < 0.55:
                self.arrive(0.1 * step)
            elif self.running:
                self.finish()
            while len(self.running) < self.servers and self.queue.size:
                self.start(0.1 * step)
            self.look()
        return self.worst

    def arrive(self, now_s: float) -> None:
        name = self.rng.choice(self.names)
        for _ in range(self.rng.choice((1, 1, 5, 20))):
            self.seq += 1
            low, high = self.sizes[name]
            cost = self.rng.uniform(low, high)
            estimate = max(1.0, cost * self.rng.choice((0.3, 1.0, 1.0, 2.0)))
            self.queue.push(Item(self.seq, name, cost, now_s, estimate=estimate), estimate)
            self.queued[name] += 1
            self.largest[name] = max(self.largest[name], cost, estimate)
        self.since.setdefault(name, (self.seq, dict(self.service)))

    def start(self, now_s: float) -> None:
        flow = self.queue.take(now_s)
        assert flow is not None
        item = flow.turn
        assert item is not None
        self.queue.serve(flow, item.estimate)
        self.queued[item.tenant] -= 1
        self.running.append(item)
        flying = sum(max(item.cost, item.estimate) / self.weights[item.tenant] for item in self.running)
        self.most_in_flight = max(self.most_in_flight, flying)

    def finish(self) -> None:
        item = self.running.pop(self.rng.randrange(len(self.running)))
        self.queue.settle(item.tenant, item.cost - item.estimate)
        self.service[item.tenant] += item.cost

    def look(self) -> None:
        for name in self.names:
            if not self.queued[name]:
                self.since.pop(name, None)
        for one in self.since:
            for other in self.since:
                if one < other:
                    self.compare(one, other)

    def compare(self, one: str, other: str) -> None:
        _, later = max(self.since[one], self.since[other], key=lambda began: began[0])
        lag = abs(
            (self.service[one] - later[one]) / self.weights[one]
            - (self.service[other] - later[other]) / self.weights[other]
        )
        # As in the paper, the largest request is that of any tenant: it sets how far apart two can enter.
        largest = max(self.largest[name] / self.weights[name] for name in self.names)
        self.worst = max(self.worst, lag / (2 * largest + self.most_in_flight))


@settings(max_examples=HISTORIES, deadline=None)
@given(st.integers(0, 1 << 40))
def test_the_service_of_two_backlogged_tenants_never_differs_by_more_than_the_bound(seed: int) -> None:
    assert Bound(seed).live(250) <= 1.0
