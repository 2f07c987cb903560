from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from llmserve.bus.flow.flows import Share
from llmserve.bus.flow.queue import FairQueue


@dataclass(eq=False)
class Item:
    seq: int
    tenant: str
    cost: float = 1.0
    seen_s: float = 0.0
    paid: bool = False
    ticket: int = 0


WEIGHTS = {"a": 1.0, "b": 1.0, "c": 2.0, "d": 4.0}


def share_of(tenant: str) -> Share:
    return Share(WEIGHTS.get(tenant, 1.0))


def serve(queue: FairQueue[Item]) -> Item:
    flow = queue.take(0.0)
    assert flow is not None
    item = flow.turn
    assert item is not None
    queue.serve(flow, 0.0 if item.paid else item.cost)
    queue.check()
    return item


@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 500)), min_size=1, max_size=200),
    st.integers(1, 500),
)
def test_service_per_weight_of_two_backlogged_tenants_differs_by_at_most_a_request_of_each(
    extra: list[tuple[str, int]], base: int
) -> None:
    queue: FairQueue[Item] = FairQueue(share_of)
    costs: dict[str, list[int]] = {tenant: [base] * 40 for tenant in WEIGHTS}
    for tenant, cost in extra:
        costs[tenant].append(cost)
    for tenant, own in costs.items():
        for number, cost in enumerate(own):
            queue.push(Item(number, tenant, cost))
    left = {tenant: len(own) for tenant, own in costs.items()}
    service = dict.fromkeys(WEIGHTS, 0.0)
    while all(left.values()):
        item = serve(queue)
        service[item.tenant] += item.cost / WEIGHTS[item.tenant]
        left[item.tenant] -= 1
        for one in WEIGHTS:
            for other in WEIGHTS:
                bound = max(costs[one]) / WEIGHTS[one] + max(costs[other]) / WEIGHTS[other]
                assert abs(service[one] - service[other]) <= bound + 1e-6


def test_within_a_tenant_requests_go_in_the_order_of_their_arrival() -> None:
    queue: FairQueue[Item] = FairQueue(share_of)
    for seq in (1, 2, 3):
        queue.push(Item(seq, "a"))
    assert [serve(queue).seq for _ in range(3)] == [1, 2, 3]


def test_a_tenant_that_was_idle_saves_nothing_up() -> None:
    queue: FairQueue[Item] = FairQueue(share_of)
    for seq in range(100):
        queue.push(Item(seq, "a"))
    for _ in range(50):
        serve(queue)
    for seq in range(100, 150):
        queue.push(Item(seq, "b"))
    first = [serve(queue).tenant for _ in range(20)]
    assert 9 <= first.count("b") <= 11


def test_a_paid_request_goes_before_everything_and_costs_nothing() -> None:
    queue: FairQueue[Item] = FairQueue(share_of)
    for seq in range(10):
        queue.push(Item(seq, "a", cost=100))
        queue.push(Item(100 + seq, "b", cost=100))
    serve(queue)
    queue.push(Item(7777, "a", paid=True))
    before = queue.virtual_time
    assert serve(queue).seq == 7777
    assert queue.virtual_time == before
    assert serve(queue).tenant == "b"


def test_a_request_that_cost_less_than_charged_brings_its_tenant_forward() -> None:
    queue: FairQueue[Item] = FairQueue(share_of)
    for seq in range(10):
        queue.push(Item(seq, "a", cost=100))
        queue.push(Item(100 + seq, "b", cost=10))
    assert serve(queue).tenant == "a"
    queue.settle("a", -95)
    served = [serve(queue).tenant for _ in range(2)]
    assert served == ["b", "a"]


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.booleans(), st.integers(0, 3)), max_size=80))
def test_the_order_stays_consistent_through_any_pushes_removals_and_settlements(
    steps: list[tuple[str, bool, int]],
) -> None:
    queue: FairQueue[Item] = FairQueue(share_of)
    queued: list[Item] = []
    for seq, (tenant, paid, what) in enumerate(steps):
        if what < 2:
            queued.append(Item(seq, tenant, paid=paid))
            queue.push(queued[-1])
        elif what == 2 and queued:
            queue.remove(queued.pop(len(queued) // 2))
        elif queued:
            queue.settle(tenant, -1.0 if paid else 1.0)
            queued.remove(serve(queue))
        queue.check()
        assert queue.size == len(queued)
    assert {serve(queue).seq for _ in range(queue.size)} == {item.seq for item in queued}
