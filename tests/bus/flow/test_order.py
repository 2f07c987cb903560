"""Specification of the order inside a tenant."""

from __future__ import annotations

import random
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve.bus.flow.flows import Order, Share
from llmserve.bus.flow.queue import FairQueue


@dataclass(eq=False)
class Item:
    seq: int
    tenant: str
    cost: float = 1.0
    seen_s: float = 0.0
    paid: bool = False
    ticket: int = 0


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
