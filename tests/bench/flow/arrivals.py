"""What arrives in each scenario: the same for every policy, from a seed or a trace."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from llmserve.bus.flow.settings import TenantSettings
from tests.processes import ROOT

TRACE = Path(os.environ.get("LLMSERVE_TRACES", ROOT.parent / "shared" / "traces")) / "mooncake_conversation.jsonl"
OUTPUT_WEIGHT = 2
"""Cost of an output token in prompt tokens, as the router has it."""
SLOTS = 16
SLOT_RATE = 1000.0
"""Cost that a slot serves in a second."""
CAPACITY = SLOTS * SLOT_RATE
MAX_TOKENS = 2048
"""What every client allows; the router does not know how long an output will be."""


@dataclass(frozen=True, slots=True)
class Job:
    """A request with its real sizes."""

    seq: int
    tenant: str
    arrives_s: float
    prompt_tokens: int
    output_tokens: int

    @property
    def cost(self) -> int:
        return self.prompt_tokens + OUTPUT_WEIGHT * self.output_tokens

    def service_s(self, slot_rate: float) -> float:
        return self.cost / slot_rate


@dataclass(frozen=True, slots=True)
class Scenario:
    """Jobs in the order of their arrival, and what is looked at."""

    name: str
    jobs: list[Job]
    end_s: float
    """Nothing is served later."""
    tenants: dict[str, TenantSettings]
    slots: int = SLOTS
    from_s: float = 0.0
    """Shares are measured from here on."""
    slot_rate: float = SLOT_RATE
    long_cost: float = 1000.0
    """Requests of at least this cost are long."""
    backlogged: bool = False
    """Every tenant asks for more than its share: the shares are compared with the weights."""
    victims: frozenset[str] = field(default_factory=frozenset)
    slo: str = ""
    """Tenant whose SLO is looked at."""

    def weight(self, tenant: str) -> float:
        return self.tenants[tenant].weight


Sizes = Callable[[random.Random], tuple[int, int]]


def around(prompt_tokens: int, output_tokens: int) -> Sizes:
    """Between half and one and a half of each."""

    def draw(rng: random.Random) -> tuple[int, int]:
        return round(prompt_tokens * rng.uniform(0.5, 1.5)), max(1, round(output_tokens * rng.uniform(0.5, 1.5)))

    return draw


def poisson(
    rng: random.Random, tenant: str, load: float, mean_cost: float, sizes: Sizes, end_s: float
) -> Iterator[Job]:
    """``load`` is the part of the pool's capacity that the tenant asks for."""
    now_s, rate = 0.0, load * CAPACITY / mean_cost
    while (now_s := now_s + rng.expovariate(rate)) < end_s:
        prompt_tokens, output_tokens = sizes(rng)
        yield Job(0, tenant, now_s, prompt_tokens, output_tokens)


def in_order(jobs: list[Job]) -> list[Job]:
    jobs.sort(key=lambda job: job.arrives_s)
    return [
        Job(seq, job.tenant, job.arrives_s, job.prompt_tokens, job.output_tokens) for seq, job in enumerate(jobs, 1)
    ]


def weights(seed: int = 1, end_s: float = 1000.0) -> Scenario:
    """Weights 1:1:2:4, unequal costs, everyone asks for more than its share and the lighter for the most of all."""
    rng, jobs = random.Random(seed), list[Job]()
    tenants = {"a": 1.0, "b": 1.0, "c": 2.0, "d": 4.0}
    asks = {"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.4}
    sizes = {"a": (200, 50), "b": (2000, 400), "c": (100, 400), "d": (500, 50)}
    for name, weight in tenants.items():
        prompt_tokens, output_tokens = sizes[name]
        load = asks[name] * weight / sum(tenants.values())
        mean = prompt_tokens + OUTPUT_WEIGHT * output_tokens
        jobs += poisson(rng, name, load, mean, around(prompt_tokens, output_tokens), end_s)
    settings = {name: TenantSettings(weight=weight) for name, weight in tenants.items()}
    return Scenario("weights 1:1:2:4", in_order(jobs), end_s, settings, from_s=end_s / 10, backlogged=True)


def flood(seed: int = 2, end_s: float = 100.0, times: float = 100.0) -> Scenario:
    """Three tenants within their share, and one that sends ``times`` as much as each; 0: without it."""
    rng, jobs = random.Random(seed), list[Job]()
    victims = ("a", "b", "c")
    for name in victims:
        jobs += poisson(rng, name, 0.15, 900, around(500, 200), end_s)
    if times:
        jobs += poisson(rng, "flood", 0.15 * times, 900, around(500, 200), end_s)
    settings = {name: TenantSettings() for name in (*victims, "flood")}
    return Scenario("flood 100 x", in_order(jobs), end_s, settings, victims=frozenset(victims))


def entitled(scenario: Scenario, tenant: str) -> Scenario:
    """One tenant's requests alone on the part of the pool that its weight entitles it to beside the others."""
    weights = sum(map(scenario.weight, scenario.tenants))
    return replace(
        scenario,
        name=f"{tenant} alone on its share",
        jobs=[job for job in scenario.jobs if job.tenant == tenant],
        tenants={tenant: scenario.tenants[tenant]},
        slots=round(scenario.slots * scenario.weight(tenant) / weights),
    )


def bimodal(seed: int = 3, end_s: float = 900.0) -> Scenario:
    """One tenant, nine short requests to each long one, at a load of 0.95."""
    rng = random.Random(seed)
    short, long = around(150, 50), around(3000, 500)

    def sizes(rng: random.Random) -> tuple[int, int]:
        return short(rng) if rng.random() < 0.9 else long(rng)

    jobs = list(poisson(rng, "a", 0.95, 0.9 * 250 + 0.1 * 4000, sizes, end_s))
    return Scenario("bimodal 90/10, 0.95", in_order(jobs), end_s + 600, {"a": TenantSettings()})


def slo(seed: int = 4, end_s: float = 300.0) -> Scenario:
    """A tenant with an SLO of 1 s sends bursts, three others ask for twice the pool."""
    rng, jobs = random.Random(seed), list[Job]()
    for name in ("a", "b", "c"):
        jobs += poisson(rng, name, 0.7, 900, around(500, 200), end_s)
    draw, now_s = around(500, 200), 10.0
    while now_s < end_s - 10:
        jobs += [Job(0, "slo", now_s + 0.01 * number, *draw(rng)) for number in range(24)]
        now_s += rng.uniform(10, 20)
    settings = {name: TenantSettings() for name in "abc"} | {"slo": TenantSettings(ttft_slo_s=1.0)}
    return Scenario("bursts under an SLO", in_order(jobs), end_s, settings, slo="slo")


def many(seed: int = 5, tenants: int = 5000, each: int = 6) -> Scenario:
    """Tenants that all wait all the time; two thirds of what they ask for is served."""
    rng = random.Random(seed)
    draw = around(200, 50)
    names = [f"t{number}" for number in range(tenants)]
    jobs = [Job(0, name, rng.uniform(0, 1), *draw(rng)) for name in names for _ in range(each)]
    end_s = 2 / 3 * sum(job.cost for job in jobs) / CAPACITY
    settings = {name: TenantSettings() for name in names}
    return Scenario(f"{tenants} tenants", in_order(jobs), end_s, settings)


def conversation(seed: int = 6, load: float = 0.95, tenants: int = 8) -> Scenario | None:
    """Mooncake's conversation trace with its own times; conversations are dealt to tenants of unequal size, and the
    pool is as fast as makes ``load``. None if the trace is not there."""
    if not TRACE.exists():
        return None
    rng, jobs, owner = random.Random(seed), list[Job](), dict[int, str]()
    names = [f"t{number}" for number in range(tenants)]
    sizes = [1 / (number + 1) for number in range(tenants)]
    for line in TRACE.read_text().splitlines():
        row = json.loads(line)
        blocks: list[int] = row["hash_ids"]
        root = blocks[min(1, len(blocks) - 1)]
        if root not in owner:
            owner[root] = rng.choices(names, sizes)[0]
        # Its times are of a grid of three seconds.
        arrives_s = row["timestamp"] / 1000 + rng.uniform(0, 3)
        jobs.append(Job(0, owner[root], arrives_s, row["input_length"], max(1, row["output_length"])))
    jobs = in_order(jobs)
    end_s = jobs[-1].arrives_s
    costs = sorted(job.cost for job in jobs)
    rate = sum(costs) / end_s / load / SLOTS
    settings = {name: TenantSettings() for name in names}
    return Scenario(
        "Mooncake conversation", jobs, end_s + 600, settings, slot_rate=rate, long_cost=costs[len(costs) * 9 // 10]
    )
