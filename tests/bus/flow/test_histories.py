"""Random histories: arrivals, grants, refusals, deaths, cancels, lost messages; every invariant after every event.

``LLMSERVE_FLOW_HISTORIES`` sets on how many each property is tried.
"""

from __future__ import annotations

import os
import random

from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmserve.bus.flow.settings import RouterSettings, TenantSettings
from llmserve.bus.messages import Role
from tests.bus.flow.world import World

HISTORIES = int(os.environ.get("LLMSERVE_FLOW_HISTORIES", "16"))

BOUNDED = RouterSettings(
    tenants={
        "a": TenantSettings(weight=1),
        "b": TenantSettings(weight=2, ttft_slo_s=1.0),
        "c": TenantSettings(max_concurrency=2),
    },
    max_tokens_in_flight=1200,
    max_prefill_concurrency=3,
    max_decode_concurrency=7,
    max_kv_hbm_bytes=90_000,
    max_kv_io_bytes_per_s=4.0,
    min_decode_slots=2,
    max_wait_s=5.0,
    queue_deadline_s=600.0,
)
TENANTS = ("a", "b", "c", "d")
CLASSES = ("interactive", "interactive", "batch")


def live_through(
    seed: int, roles: tuple[Role, ...], loss: float, steps: int, restarts: bool = False, warm: bool = False
) -> World:
    rng = random.Random(seed)
    world = World(BOUNDED, rng, loss)
    for role in roles:
        world.spawn(role)
    for _ in range(steps):
        dice = rng.random()
        alive = [worker for worker in world.workers.values() if worker.alive]
        if dice < 0.35:
            world.arrive(
                rng.choice(TENANTS), rng.choice((5, 20, 60, 300)), rng.choice((1, 10, 200)), rng.choice(CLASSES)
            )
            world.dispatch()
        elif dice < 0.65:
            world.finish_one(rng.choice(alive))
            world.dispatch()
        elif dice < 0.80:
            world.elapse(rng.choice((0.05, 0.3, 0.7)))
            world.beat_all()
        elif dice < 0.90:
            for worker in alive:
                world.deliver(worker)
            world.dispatch()
        elif dice < 0.95 and world.outcome:
            world.cancel(rng.choice(list(world.outcome)))
        elif dice < 0.97 and loss:
            victim = rng.choice(alive)
            world.kill(victim)
            world.spawn(victim.role)
        elif dice < 0.98:
            world.elapse(4.0)
        elif dice < 0.99 and restarts:
            world.restart_router(warm=warm)
    return world


def assert_all_ended(world: World) -> None:
    world.settle()
    open_requests = [name for name, outcome in world.outcome.items() if outcome == "open"]
    assert open_requests == []
    assert world.core.ledger.entries == {}
    assert world.stream == {}
    assert world.core.ledger.budgets.tokens_in_flight == 0
    assert all(not worker.book and worker.pages == 0 for worker in world.core.ledger.workers.values())


@settings(max_examples=HISTORIES, deadline=None)
@given(st.integers(0, 1 << 30), st.sampled_from((0.0, 0.05, 0.2)))
def test_with_prefill_and_decode_workers_every_request_ends_and_no_bound_is_ever_exceeded(
    seed: int, loss: float
) -> None:
    world = live_through(seed, (Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE), loss, 150)
    assert_all_ended(world)


@settings(max_examples=HISTORIES, deadline=None)
@given(st.integers(0, 1 << 30), st.sampled_from((0.0, 0.05, 0.2)))
def test_with_workers_of_both_roles_every_request_ends_and_no_bound_is_ever_exceeded(seed: int, loss: float) -> None:
    world = live_through(seed, (Role.BOTH, Role.BOTH), loss, 150)
    assert_all_ended(world)


@settings(max_examples=HISTORIES, deadline=None)
@given(st.integers(0, 1 << 30))
def test_without_faults_no_attempt_is_lost(seed: int) -> None:
    rng = random.Random(seed)
    world = World(BOUNDED, rng, 0.0)
    for role in (Role.PREFILL, Role.DECODE):
        world.spawn(role)
    for _ in range(40):
        world.arrive(rng.choice(TENANTS), rng.choice((5, 20, 60, 300)), rng.choice((1, 10, 200)))
    assert_all_ended(world)
    assert set(world.outcome.values()) == {"finished"}
    assert sum(world.core.stats.attempts_lost.values()) == 0


@settings(max_examples=HISTORIES, deadline=None)
@given(st.integers(0, 1 << 30), st.sampled_from((0.0, 0.1)), st.booleans())
@example(11, 0.1, False)
@example(125, 0.1, False)
@example(1234, 0.1, False)
@example(11070, 0.1, True)
@example(12166, 0.1, False)
@example(26764, 0.1, True)
@example(946651234, 0.1, False)
def test_new_leaders_in_between_lose_nothing_and_grant_nothing_that_still_runs(
    seed: int, loss: float, both: bool
) -> None:
    roles = (Role.BOTH, Role.BOTH) if both else (Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE)
    world = live_through(seed, roles, loss, 250, restarts=True)
    assert_all_ended(world)


@settings(max_examples=HISTORIES, deadline=None)
@given(st.integers(0, 1 << 30), st.sampled_from((0.0, 0.1)), st.booleans())
def test_standbys_that_take_over_lose_nothing_and_grant_nothing_that_still_runs(
    seed: int, loss: float, both: bool
) -> None:
    roles = (Role.BOTH, Role.BOTH) if both else (Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE)
    world = live_through(seed, roles, loss, 250, restarts=True, warm=True)
    assert_all_ended(world)
