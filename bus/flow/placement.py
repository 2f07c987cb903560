"""Where a request goes: the worker with the least cost, at random among the near-best, so that load spreads."""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable

from llmserve.bus.flow.credits import WorkerState
from llmserve.bus.flow.entry import Entry
from llmserve.bus.flow.locality import Locality, Reuse
from llmserve.bus.messages import Stage, Tier

NEAR_BEST = 0.05
"""Workers whose cost is within this of the least are equally good."""
WORK_WEIGHT = 1.25
"""Of a token to compute against one to wait for: what one request computes, all others on the worker wait for."""
DRAIN_STEPS_S = 2.0
"""Steps of prompts that a worker is believed to compute a second until it has measured it."""
_NOTHING = (0.0, 0.0)


class Placement(ABC):
    """What a request means to a worker."""

    @abstractmethod
    def begin(self, now_s: float) -> None:
        """Placements at ``now_s`` follow."""

    @abstractmethod
    def work_tokens(self, entry: Entry, worker: WorkerState) -> int:
        """What the worker's credit is charged: prompt tokens that it has to compute."""

    @abstractmethod
    def cost(self, entry: Entry, worker: WorkerState) -> float:
        """What a worker that could take it now would make of it, in its engine's steps or shares of its memory;
        comparable between such workers."""

    @abstractmethod
    def granted(self, entry: Entry, worker: WorkerState) -> None:
        """The worker gets it: write down in the entry what that means."""


class ByLocality(Placement):
    """Load against recomputation: what a worker would have to compute and to load, behind what it has to do already.

    A prefill worker has its whole book to do. A worker of both roles decodes most of it: what is left of its prompts
    is estimated from the pace at which it computes them, and its decoding by the memory in use.
    """

    def __init__(self, locality: Locality) -> None:
        self._locality = locality
        self._now_s = 0.0
        self._backlogs: dict[str, tuple[float, float]] = {}
        """Of workers of both roles: tokens to compute, and when."""

    def begin(self, now_s: float) -> None:
        self._now_s = now_s

    def work_tokens(self, entry: Entry, worker: WorkerState) -> int:
        return math.ceil(self._reuse(entry, worker).work_tokens)

    def cost(self, entry: Entry, worker: WorkerState) -> float:
        if worker.stage is Stage.DECODE:
            return worker.load()
        step_tokens = _step_tokens(worker)
        prefix = entry.prefix  # many a prompt names no blocks
        tokens = WORK_WEIGHT * (entry.prompt_tokens if prefix is None else self._reuse(entry, worker).work_tokens)
        if worker.stage is Stage.PREFILL:
            return (worker.outstanding_tokens + tokens) / step_tokens
        return worker.load() + (self._backlog(worker, step_tokens) + tokens) / step_tokens

    def granted(self, entry: Entry, worker: WorkerState) -> None:
        if worker.stage is Stage.DECODE:
            return
        reuse = self._reuse(entry, worker)
        entry.work_tokens = math.ceil(reuse.work_tokens)
        entry.cached_tokens = reuse.cached_tokens
        loaded_tokens = reuse.cached_tokens - reuse.tokens.get(Tier.GPU, 0)
        entry.loaded_bytes = loaded_tokens // max(1, worker.beat.page_tokens) * worker.beat.page_bytes
        self._locality.granted(reuse, entry.prompt_tokens)
        if worker.stage is Stage.WHOLE:
            self._backlogs[worker.member] = (
                self._backlog(worker, _step_tokens(worker)) + reuse.work_tokens,
                self._now_s,
            )

    def forget(self, member: str) -> None:
        """The worker is gone."""
        self._backlogs.pop(member, None)

    def _reuse(self, entry: Entry, worker: WorkerState) -> Reuse:
        return self._locality.reuse(entry.prefix, entry.prompt_tokens, worker)

    def _backlog(self, worker: WorkerState, step_tokens: float) -> float:
        tokens, at_s = self._backlogs.get(worker.member, _NOTHING)
        if not tokens:
            return 0.0
        pace = worker.beat.prefill_tokens_s or DRAIN_STEPS_S * step_tokens
        return max(0.0, tokens - (self._now_s - at_s) * pace)


def _step_tokens(worker: WorkerState) -> float:
    """Prompt tokens of one engine step: a worker's credit is two of them."""
    return max(1.0, worker.beat.prefill_tokens / 2)


def cheapest(
    entry: Entry, workers: Iterable[WorkerState], placement: Placement, rng: random.Random
) -> WorkerState | None:
    """The worker to take, None if there is none."""
    able = list(workers)
    if len(able) < 2:
        return able[0] if able else None
    costs = [(placement.cost(entry, worker), worker) for worker in able]
    least = min(value for value, _ in costs)
    return rng.choice([worker for value, worker in costs if value <= least + NEAR_BEST])
