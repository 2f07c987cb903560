"""Where a request goes: the worker with the least cost, at random among the near-best, so that load spreads."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import TypeAlias

from llmserve.bus.flow.credits import WorkerState
from llmserve.bus.flow.entry import Entry

NEAR_BEST = 0.05
"""Workers whose cost is within this of the least are equally good."""

Cost: TypeAlias = Callable[[Entry, WorkerState], float]
"""What a worker that could take a request now would make of it, 0 to about 1; comparable between such workers."""


def by_load(entry: Entry, worker: WorkerState) -> float:
    """The same for every request: how busy the worker is."""
    return worker.load()


def cheapest(entry: Entry, workers: Iterable[WorkerState], cost: Cost, rng: random.Random) -> WorkerState | None:
    """The worker to take, None if there is none."""
    costs = [(cost(entry, worker), worker) for worker in workers]
    if len(costs) < 2:
        return costs[0][1] if costs else None
    least = min(value for value, _ in costs)
    return rng.choice([worker for value, worker in costs if value <= least + NEAR_BEST])
