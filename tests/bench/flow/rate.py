"""How many requests one core of the router takes in, grants, and sees confirmed and ended in a second."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

from llmserve.bus.collector import rest_collector
from llmserve.bus.flow.actions import SendGrant
from llmserve.bus.flow.core import RouterCore
from llmserve.bus.flow.settings import RouterSettings
from llmserve.bus.messages import Accepted, Finished, Reason, Role
from tests.bus.flow.world import beat, request, stored

REQUESTS = 20_000
WORKERS = 4
ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Cost:
    """CPU time of one request, so that neighbours on the machine count little."""

    arrival_us: float
    decision_us: float
    """Grant, confirmation and end."""

    @property
    def rate(self) -> float:
        """Requests a second."""
        return 1e6 / (self.arrival_us + self.decision_us)


def once(tenants: int) -> Cost:
    """All requests are queued first; four workers with 16 slots."""
    core, rng = RouterCore(RouterSettings(), random.Random(1)), random.Random(2)
    core.begin("r0", 1)
    for number in range(WORKERS):
        core.handle(beat(f"w{number}", Role.BOTH, slots=16, pages_total=0), 0.0)
    items = [
        stored(seq, f"t{rng.randrange(tenants)}", request(f"q{seq}", 0, rng.randint(10, 900), 100))
        for seq in range(1, REQUESTS + 1)
    ]
    began_s = time.process_time()
    for item in items:
        core.handle(item, 0.0)
    queued_s = time.process_time()
    ended = 0
    now_s = 0.0
    actions = core.dispatch(now_s)
    while ended < REQUESTS:
        running = [action for action in actions if isinstance(action, SendGrant)]
        actions = []
        for action in running:
            now_s += 1e-5
            grant = action.grant
            core.handle(
                Accepted(worker=action.worker, seq=grant.seq, attempt=0, stage=grant.stage, epoch=1),
                now_s,
            )
            core.handle(
                Finished(
                    worker=action.worker,
                    seq=grant.seq,
                    request_id=f"q{grant.seq}",
                    attempt=0,
                    stage=grant.stage,
                    reason=Reason.STOP,
                    output_tokens=20,
                ),
                now_s,
            )
            actions += core.dispatch(now_s)
            ended += 1
    ended_s = time.process_time()
    return Cost((queued_s - began_s) / REQUESTS * 1e6, (ended_s - queued_s) / REQUESTS * 1e6)


def costs() -> tuple[Cost, Cost]:
    """With 10 tenants, and with 5,000: of rounds that take turns the ones that were disturbed least."""
    rest_collector(50_000)  # as ``llmserve-worker --role router`` does
    pairs = [(once(10), once(5000)) for _ in range(ROUNDS)]
    return max((few for few, _ in pairs), key=lambda cost: cost.rate), max(
        (many for _, many in pairs), key=lambda cost: cost.rate
    )
