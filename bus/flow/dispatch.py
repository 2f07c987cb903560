"""Who goes next, and where to."""

from __future__ import annotations

import random
from dataclasses import dataclass

from llmserve.bus.flow.credits import WorkerState
from llmserve.bus.flow.entry import Charge, Entry
from llmserve.bus.flow.ledger import Ledger
from llmserve.bus.flow.placement import Placement, cheapest
from llmserve.bus.flow.queue import FairQueue, Flow
from llmserve.bus.messages import Stage

SCAN = 8
"""Heads that do not fit which one pass over a queue steps past."""
LEAST_AHEAD = 4
"""Handoffs that may always wait for a busy decode pool."""


@dataclass(frozen=True, slots=True)
class Granted:
    entry: Entry
    worker: WorkerState
    waited_s: float


@dataclass(frozen=True, slots=True)
class Unservable:
    entry: Entry
    message: str


Decision = Granted | Unservable


class Dispatcher:
    """Serves the queues in fair order for as long as something fits.

    A head that does not fit is stepped past, so that it blocks nobody; once it has been so for ``bypass_s`` it is
    not any more: its stage then drains until it fits, so that nobody starves it.
    """

    def __init__(self, ledger: Ledger, rng: random.Random, placement: Placement) -> None:
        self._ledger = ledger
        self._placement = placement
        self._settings = ledger.settings
        self._rng = rng
        self._starved: FairQueue[Entry] | None = None
        """The queue whose oldest head waits for the token budget: it goes first."""

    def dispatch(self, now_s: float) -> list[Decision]:
        """Move all that can go to workers; takes O(workers + log requests) per decision."""
        self._placement.begin(now_s)
        decisions: list[Decision] = []
        for fingerprint, queue in self._ledger.decode_queues.items():
            if queue.size:
                self._serve(queue, self._decode_workers(fingerprint), now_s, decisions)
        queues = sorted(self._ledger.first_queues.items(), key=lambda item: item[1] is not self._starved)
        self._starved = None
        ahead = self._handoffs_ahead() if any(queue.size for _, queue in queues) else {}
        for api, queue in queues:
            if queue.size and self._serve(queue, self._first_workers(api, ahead), now_s, decisions):
                self._starved = queue
                break
        return decisions

    def _serve(
        self, queue: FairQueue[Entry], workers: list[WorkerState], now_s: float, decisions: list[Decision]
    ) -> bool:
        """Serve one queue; returns whether everything must wait for the token budget now."""
        aside: list[Flow[Entry]] = []
        starved = False
        while self._any_room(workers) and (flow := queue.take()) is not None:
            entry = flow.head()
            if not entry.counted and self._ledger.budgets.tenant_full(flow.tenant):
                queue.park(flow)
            elif message := self._never(entry, workers):
                decisions.append(Unservable(queue.serve(flow, 0.0), message))
            elif (worker := self._choose(entry, workers)) is not None:
                decisions.append(self._grant(queue, flow, worker, now_s))
            else:
                aside.append(flow)
                if entry.blocked_since_s is None:
                    entry.blocked_since_s = now_s
                patient = entry.is_suspect or now_s - entry.blocked_since_s < self._settings.bypass_s
                if not patient or len(aside) == SCAN:
                    starved = not patient and not self._ledger.budgets.has_tokens_for(entry)
                    break
        for flow in aside:
            queue.restore(flow)
        return starved

    def _grant(self, queue: FairQueue[Entry], flow: Flow[Entry], worker: WorkerState, now_s: float) -> Granted:
        entry = flow.head()
        self._placement.granted(entry, worker)
        cost = 0.0 if entry.paid else self._ledger.costs.estimate(entry)
        queue.serve(flow, cost)
        if cost:
            entry.charges.append(Charge(queue, cost))
        waited_s = now_s - entry.since_s
        self._ledger.grant(entry, worker, now_s)
        return Granted(entry, worker, waited_s)

    def _choose(self, entry: Entry, workers: list[WorkerState]) -> WorkerState | None:
        """The worker that takes it now; None if it has to wait."""
        budgets, reserved = self._ledger.budgets, self._settings.reserved_output_tokens
        if not budgets.has_tokens_for(entry):
            return None
        able = [
            worker
            for worker in workers
            if worker.fits(entry, reserved, self._placement.work_tokens)
            and worker.serves(entry)
            and not budgets.stage_full(worker.stage)
        ]
        return cheapest(entry, able, self._placement, self._rng)

    def _any_room(self, workers: list[WorkerState]) -> bool:
        budgets = self._ledger.budgets
        return any(worker.has_room() and not budgets.stage_full(worker.stage) for worker in workers)

    def _never(self, entry: Entry, workers: list[WorkerState]) -> str:
        """Why no live worker could ever serve the request; empty if one could."""
        if entry.handoff is not None:
            return ""
        if not self._ledger.budgets.could_ever_have(entry):
            bound = self._settings.max_tokens_in_flight
            return f"prompt and max_tokens are {entry.bound_tokens} tokens, max_tokens_in_flight allows {bound}"
        if any(worker.serves(entry) for worker in workers):
            return ""
        longest = max(
            worker.beat.max_model_len
            for worker in self._ledger.workers.values()
            if worker.stage is not Stage.DECODE and worker.beat.api == entry.api
        )
        if entry.prompt_tokens < longest:
            return ""
        return f"the prompt has {entry.prompt_tokens} tokens, the model's context is {longest}"

    def _decode_workers(self, fingerprint: str) -> list[WorkerState]:
        return [
            worker
            for worker in self._ledger.workers.values()
            if worker.stage is Stage.DECODE and worker.beat.fingerprint == fingerprint
        ]

    def _first_workers(self, api: str, ahead: dict[str, int]) -> list[WorkerState]:
        """Prefill workers only while their handoffs would find a decode worker within their lease."""
        queues = self._ledger.decode_queues
        workers = []
        for worker in self._ledger.workers.values():
            if worker.stage is Stage.DECODE or worker.beat.api != api:
                continue
            fingerprint = worker.beat.fingerprint
            waiting = queues[fingerprint].size if fingerprint in queues else 0
            if worker.stage is Stage.WHOLE or waiting < ahead.get(fingerprint, 0):
                workers.append(worker)
        return workers

    def _handoffs_ahead(self) -> dict[str, int]:
        """Handoffs that may wait for decode workers, by fingerprint: a quarter of what these run at once, so that
        a wait is about a quarter of a request's time and far below a lease. None without a decode worker."""
        slots: dict[str, int] = {}
        for worker in self._ledger.workers.values():
            if worker.stage is Stage.DECODE and not worker.beat.draining:
                slots[worker.beat.fingerprint] = slots.get(worker.beat.fingerprint, 0) + worker.beat.slots
        bound = self._settings.max_decode_concurrency
        return {
            fingerprint: max(LEAST_AHEAD, min(number, bound or number) // 4) for fingerprint, number in slots.items()
        }
