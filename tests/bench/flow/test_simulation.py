"""The comparison's own arithmetic, and that every policy serves what it is given exactly once."""

from __future__ import annotations

import random

import numpy as np
import pytest

from llmserve.bus.flow.settings import TenantSettings
from tests.bench.flow.arrivals import SLOTS, Job, Scenario
from tests.bench.flow.figures import jain, lag_over_bound, served_by, service, share_error
from tests.bench.flow.policies import POLICIES, Fcfs, Ours, Policy
from tests.bench.flow.simulate import simulate


def scenario(end_s: float, weights: dict[str, float], each: int = 200) -> Scenario:
    rng = random.Random(1)
    jobs = [
        Job(number * len(weights) + place + 1, tenant, 0.001 * number, rng.randint(50, 500), rng.randint(10, 300))
        for number in range(each)
        for place, tenant in enumerate(weights)
    ]
    tenants = {name: TenantSettings(weight=weight) for name, weight in weights.items()}
    return Scenario("small", jobs, end_s, tenants)


@pytest.mark.parametrize("kind", POLICIES)
def test_every_policy_serves_everything_once_and_leaves_no_slot_idle_while_something_waits(
    kind: type[Policy],
) -> None:
    given = scenario(1e6, {"a": 1.0, "b": 3.0})
    run = simulate(given, kind)
    assert len(run.started_s) == len(given.jobs)
    assert sum(service(run).values()) == pytest.approx(sum(job.cost for job in given.jobs))
    last_start_s = max(run.started_s.values())
    busy_s = sum(min(run.ended_s(job), last_start_s) - run.started_s[job.seq] for job in given.jobs)
    assert busy_s == pytest.approx(SLOTS * last_start_s, rel=0.02)


def test_service_until_a_moment_is_the_sum_over_the_jobs() -> None:
    rng = np.random.default_rng(1)
    starts = rng.uniform(0, 50, 40)
    ends, at = starts + rng.uniform(0, 9, 40), np.linspace(-1, 70, 33)
    slow = [sum(min(max(0.0, t - s), e - s) for s, e in zip(starts, ends, strict=True)) * 3.0 for t in at]
    assert served_by(starts, ends, at, 3.0) == pytest.approx(slow)


def test_the_figures_tell_a_fair_order_from_one_that_is_not() -> None:
    given = scenario(24.0, {"a": 1.0, "b": 4.0}, 800)
    first_come, ours = simulate(given, Fcfs), simulate(given, Ours)
    assert share_error(first_come) > 0.5 > 0.05 > share_error(ours)
    assert jain(first_come) < 0.9 < jain(ours)
    assert lag_over_bound(ours) <= 1.0 < lag_over_bound(first_come)
