"""The bound of fairness across tenants as it holds for the whole core, on random histories of deployments.

``LLMSERVE_FLOW_HISTORIES`` sets how many histories it is tried on (10,000 for a full run).

What the core adds to the bound of ``bus/flow/queue.py``. A head that does not fit is stepped past: its flow keeps
its tag while virtual time rises with those that are served meanwhile, and it catches up when it fits. Let D of f be
that rise since its tag was last at virtual time or above. Then R >= v - O - D in place of R >= v - O, and the rest of
the derivation stands: in any interval in which f and g both wait, neither at its own ``max_concurrency``,

    service of f - service of g  <=  (A + U + O + E + D of f) + (A + U + O + E + D of g)

per weight, at each stage by itself. U and O are over what is charged at the stage and not settled, and a prefill is
settled when its request has ended: until then its handoff waits and decodes. Workers, budgets, credits, refusals,
batch work and reservations only decide when something is served, and D. Without D 9 of 250 histories are above it.
"""

from __future__ import annotations

import itertools
import os
import random
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve.bus.flow.actions import SendGrant
from llmserve.bus.flow.entry import Entry
from llmserve.bus.flow.events import Event
from llmserve.bus.flow.flows import Flow
from llmserve.bus.flow.queue import FairQueue
from llmserve.bus.flow.settings import RouterSettings, TenantSettings
from llmserve.bus.messages import Finished, Refused, Request, Role, Stage
from tests.bus.flow.test_bound import ROUNDING, Item, Tenant, Window
from tests.bus.flow.world import World

HISTORIES = int(os.environ.get("LLMSERVE_FLOW_HISTORIES", "20"))
LEAD = 300.0
KB = 1024


@dataclass
class Order:
    """One stage's order, as the bound sees it."""

    tenants: dict[str, Tenant]
    charged: dict[int, Item] = field(default_factory=dict)
    """What was charged and is not settled, by sequence."""
    behind: dict[str, float] = field(default_factory=dict)
    most_behind: dict[str, float] = field(default_factory=dict)
    """D, now and at most."""
    windows: dict[tuple[str, str], Window] = field(default_factory=dict)
    worst: float = 0.0
    """Lag over its bound at its worst."""

    def rose(self, name: str, flow: Flow[Entry], by: float, virtual_time: float) -> None:
        """Virtual time rose ``by``, while the head of a tenant that waits did not fit."""
        caught_up = flow.tag >= virtual_time
        self.behind[name] = 0.0 if caught_up else self.behind.get(name, 0.0) + by
        self.most_behind[name] = max(self.most_behind.get(name, 0.0), self.behind[name])

    def look(self, waiting: set[str]) -> None:
        for pair in itertools.combinations(self.tenants, 2):
            if not waiting.issuperset(pair):
                self.windows.pop(pair, None)
                continue
            one, other = (self.tenants[name] for name in pair)
            lag, _ = self.windows.setdefault(pair, Window()).see(one, other)
            allowed = one.bound + other.bound + sum(self.most_behind.get(name, 0.0) for name in pair)
            if lag > ROUNDING:
                self.worst = max(self.worst, lag / (allowed + ROUNDING))


class FairWorld(World):
    """No message is lost and nobody dies. Grants are refused at times; outputs are shorter than they may be; of pages
    that are handed off all, half or none have to move."""

    def __init__(self, rng: random.Random, kv: random.Random) -> None:
        tenants = {
            f"t{number}": TenantSettings(
                weight=rng.choice((0.5, 1.0, 1.0, 2.0, 4.0)),
                ttft_slo_s=rng.choice((None, None, None, 2.0)),
                max_concurrency=rng.choice((None, None, None, 2)),
            )
            for number in range(rng.randint(2, 5))
        }
        bounds = RouterSettings(
            tenants=tenants,
            max_tokens_in_flight=rng.choice((None, 1200, 3000)),
            max_prefill_concurrency=rng.choice((None, 3)),
            max_decode_concurrency=rng.choice((None, 7)),
            max_kv_hbm_bytes=rng.choice((None, None, 90_000)),
            max_wait_s=rng.choice((5.0, 60.0)),
            slo_lead_tokens=LEAD,
            first_expected_output_tokens=rng.choice((20.0, 256.0)),
            kv_tokens_per_gb=kv.choice((0.0, 2.0**20)),
        )
        super().__init__(bounds, rng, 0.0)
        self.outputs: dict[str, int] = {}
        self.kv, self.hands_off = kv, True
        self.pages: dict[str, tuple[int, int]] = {}
        """KB that each request hands off, and those of them that move."""
        self.refusing = rng.choice((0.0, 0.1))
        self.orders = {
            decode: Order(
                {
                    name: Tenant(t.weight, (0, 0), None, 0, LEAD / t.weight if t.ttft_slo_s and not decode else 0.0)
                    for name, t in tenants.items()
                }
            )
            for decode in (False, True)
        }
        """Of the first stage and of decode."""

    @property
    def worst(self) -> float:
        return max(order.worst for order in self.orders.values())

    # -- what this world does differently

    def output_tokens(self, of: Request) -> int:
        return self.outputs.setdefault(of.request_id, self.rng.randint(1, of.max_tokens))

    def page_bytes(self, of: Request) -> int:
        return KB * self.handed_and_moved_kb(of)[0]

    def moved_bytes(self, of: Request) -> int:
        return KB * self.handed_and_moved_kb(of)[1]

    def handed_and_moved_kb(self, of: Request) -> tuple[int, int]:
        handed = self.kv.choice((0, 10, 500))
        return self.pages.setdefault(of.request_id, (handed, self.kv.choice((0, handed // 2, handed))))

    def cost(self, of: Request) -> float:
        """The real one."""
        moved_bytes = self.moved_bytes(of) if self.hands_off else 0
        moved_tokens = self.settings.kv_tokens_per_gb * moved_bytes / 2**30
        return of.prompt_tokens + 2.0 * self.output_tokens(of) + moved_tokens

    def receive(self, action: SendGrant) -> None:
        grant = action.grant
        entry = self.core.ledger.entries[grant.seq]
        order = self.orders[grant.stage is Stage.DECODE]
        if grant.seq not in order.charged and entry.klass != "batch":
            charge = next(charge for charge in entry.charges if charge.queue is entry.queue)
            cost = self.cost(self.stream[grant.seq].request)
            order.charged[grant.seq] = item = Item(grant.seq, grant.tenant, cost, charge.cost, entry.seen_s)
            order.tenants[grant.tenant].charged(item)
        if self.rng.random() < self.refusing:
            self.workers[action.worker].out.append(
                Refused(worker=action.worker, seq=grant.seq, attempt=0, stage=grant.stage, reason="busy")
            )
        else:
            super().receive(action)

    def tell(self, event: Event) -> None:
        super().tell(event)
        if isinstance(event, Finished):
            for order in self.orders.values():
                if (item := order.charged.pop(event.seq, None)) is not None:
                    order.tenants[item.tenant].settled(item)
        self.look()

    def dispatch(self) -> None:
        queues = {decode: queue for decode in self.orders if (queue := self.queue(decode)) is not None}
        before = {decode: (queue.virtual_time, self.stuck(queue)) for decode, queue in queues.items()}
        super().dispatch()
        for decode, (time, stuck) in before.items():
            queue, order = queues[decode], self.orders[decode]
            for name in stuck | self.stuck(queue):
                order.rose(name, queue._flows[name], queue.virtual_time - time, queue.virtual_time)
        self.look()

    def check(self) -> None:
        """Other tests' business, and linear in all that waits."""

    # -- what is seen

    def queue(self, decode: bool) -> FairQueue[Entry] | None:
        ledger = self.core.ledger
        lanes = ledger.decode_queues.get("f1") if decode else ledger.first_queues.get("a1")
        return None if lanes is None else lanes.interactive

    def stuck(self, queue: FairQueue[Entry]) -> set[str]:
        """Tenants with a request that did not fit when its turn came."""
        return {entry.tenant for entry in queue.items() if entry.blocked_since_s is not None}

    def look(self) -> None:
        for decode, order in self.orders.items():
            queue = self.queue(decode)
            flows = [] if queue is None else queue._flows.values()
            order.look({flow.tenant for flow in flows if flow.size and not flow.parked})


def live(seed: int, steps: int = 150) -> FairWorld:
    """Until the first attempt is lost: a lease may end."""
    rng = random.Random(seed)
    world = FairWorld(rng, random.Random(seed))
    both = rng.random() < 0.5
    world.hands_off = not both
    for role in (Role.BOTH, Role.BOTH) if both else (Role.PREFILL, Role.PREFILL, Role.DECODE):
        world.spawn(role)
    pace = [rng.choice((1.0, 3.0)) if worker.role is Role.PREFILL else 1.0 for worker in world.workers.values()]
    sizes = {name: rng.choice(((5, 60), (20, 20), (5, 300))) for name in world.settings.tenants}
    for _ in range(steps):
        dice = rng.random()
        if dice < 0.35:
            name = rng.choice(list(sizes))
            for _ in range(rng.choice((1, 3, 10))):
                klass = rng.choice(("interactive",) * 9 + ("batch",))
                world.arrive(name, rng.randint(*sizes[name]), rng.choice((1, 10, 100)), klass)
            world.dispatch()
        elif dice < 0.80:
            world.finish_one(*rng.choices(list(world.workers.values()), pace))
            world.dispatch()
        elif dice < 0.90:
            world.elapse(rng.choice((0.05, 0.3, 0.7)))
            world.beat_all()
        else:
            for worker in world.workers.values():
                world.deliver(worker)
            world.dispatch()
        if world.upset:
            break
    return world


@settings(max_examples=HISTORIES, deadline=None)
@given(st.integers(0, 1 << 40))
def test_at_each_stage_of_a_deployment_two_tenants_that_wait_are_served_alike_within_the_bound(seed: int) -> None:
    assert live(seed).worst <= 1.0


def test_the_bound_of_the_core_is_tight_enough_to_be_approached() -> None:
    assert max(live(seed).worst for seed in (17, 27, 41)) > 0.8
