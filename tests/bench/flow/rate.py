"""How many requests one core of the router takes in, grants, and sees confirmed and ended in a second."""

from __future__ import annotations

import random
import statistics
import time

from llmserve.bus.flow.actions import SendGrant
from llmserve.bus.flow.core import RouterCore
from llmserve.bus.flow.settings import RouterSettings
from llmserve.bus.messages import Accepted, Finished, Reason, Role
from tests.bus.flow.world import beat, request, stored

REQUESTS = 20_000
WORKERS = 4
ROUNDS = 3


def once(tenants: int) -> float:
    """Requests a second of CPU time, so that neighbours on the machine count little.

    All of them are queued first; four workers with 16 slots.
    """
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
    return REQUESTS / (time.process_time() - began_s)


def rates() -> tuple[float, float]:
    """(requests/s with 10 tenants, with 5,000), medians of rounds that take turns."""
    few, many = [], []
    for _ in range(ROUNDS):
        few.append(once(10))
        many.append(once(5000))
    return statistics.median(few), statistics.median(many)
