"""Who goes next, and where to."""

from __future__ import annotations

import math
import random

import msgspec

from llmserve.bus.flow.credits import WorkerState
from llmserve.bus.flow.entry import Charge, Entry
from llmserve.bus.flow.flows import Flow
from llmserve.bus.flow.lanes import Lanes
from llmserve.bus.flow.ledger import Ledger
from llmserve.bus.flow.placement import Placement, cheapest
from llmserve.bus.flow.pools import Pools
from llmserve.bus.flow.queue import FairQueue
from llmserve.bus.messages import Stage

SCAN = 8
"""Heads that do not fit which one pass over a queue steps past."""


class Granted(msgspec.Struct, frozen=True):
    entry: Entry
    worker: WorkerState
    waited_s: float


class Unservable(msgspec.Struct, frozen=True):
    entry: Entry
    message: str


Decision = Granted | Unservable


class Dispatcher:
    """Serves the queues in fair order for as long as something fits.

    A head that does not fit is stepped past, so that it blocks nobody; once it has been so for ``bypass_s`` it is
    not any more: its stage then drains until it fits, so that nobody starves it. Batch work is served where no
    interactive request could use the room, and first when it has earned it.
    """

    def __init__(self, ledger: Ledger, rng: random.Random, placement: Placement) -> None:
        self._ledger = ledger
        self._pools = Pools(ledger)
        self._placement = placement
        self._settings = ledger.settings
        self._rng = rng
        self._starved: Lanes | None = None
        """The lanes whose oldest head waits for a cluster-wide budget: they go first."""
        self._kv_left = math.inf
        """Bytes of ``max_kv_hbm_bytes`` that are neither used nor set aside, in this dispatch."""
        self.wake_s: float | None = None
        """When the bucket of KV transfers lets the next handoff through, if one waits for it."""

    def dispatch(self, now_s: float) -> list[Decision]:
        """Move all that can go to workers; takes O(workers + log requests) per decision."""
        ledger, decisions = self._ledger, list[Decision]()
        self.wake_s = None
        self._begin(now_s)
        for fingerprint, lanes in ledger.decode_queues.items():
            if lanes.size:
                workers = self._pools.decode_workers(fingerprint)
                self._serve(lanes, workers, workers, now_s, decisions)
        waiting = [(api, lanes) for api, lanes in ledger.first_queues.items() if lanes.size]
        if not waiting:
            return decisions
        waiting.sort(key=lambda item: item[1] is not self._starved)
        self._starved = None
        for api, lanes in waiting:
            interactive = self._pools.first_workers(api, batch=False)
            batch = self._pools.first_workers(api, batch=True) if lanes.batch.size else []
            if self._serve(lanes, interactive, batch, now_s, decisions):
                self._starved = lanes
                break
        return decisions

    def _begin(self, now_s: float) -> None:
        self._placement.begin(now_s)
        self._ledger.budgets.wire.elapse(now_s)
        self._kv_left = self._ledger.budgets.kv_hbm_left(self._ledger.workers.values())

    def _serve(
        self,
        lanes: Lanes,
        interactive: list[WorkerState],
        batch: list[WorkerState],
        now_s: float,
        decisions: list[Decision],
    ) -> bool:
        """Serve both lanes; returns whether everything must wait for a cluster-wide budget now."""
        if lanes.batch.size and self._serve_due(lanes, batch, now_s, decisions):
            return False
        blocked, starved = self._serve_lane(lanes, interactive, batch, now_s, decisions)
        if lanes.batch.size and not blocked and lanes.interactive.all_parked():
            _, starved = self._serve_lane(lanes, batch, None, now_s, decisions)
        return starved

    def _serve_lane(
        self,
        lanes: Lanes,
        workers: list[WorkerState],
        batch: list[WorkerState] | None,
        now_s: float,
        decisions: list[Decision],
    ) -> tuple[bool, bool]:
        """Serve the interactive lane, or the other if ``batch``, the workers for batch work, is None.

        Returns whether something does not fit, and whether everything must wait for a cluster-wide budget.
        """
        is_batch = batch is None
        queue = lanes.batch if is_batch else lanes.interactive
        room = [worker for worker in workers if self._has_room(worker, batch=is_batch)]
        aside: list[Flow[Entry]] = []
        starved = False
        while room and (flow := queue.take(now_s)) is not None:
            worker = self._next(lanes, queue, flow, room, workers, now_s, decisions)
            if worker is not None:
                due = batch if lanes.batch.size else None
                if due:
                    self._serve_due(lanes, due, now_s, decisions)
                # A grant takes room of its worker, and of all others only when their stage is full with it.
                if due or not self._has_room(worker, batch=is_batch):
                    room = [other for other in room if self._has_room(other, batch=is_batch)]
            elif flow.turn is not None:
                aside.append(flow)
                patient = self._patient(flow.turn, now_s)
                if not patient or len(aside) == SCAN:
                    starved = not patient and self._awaits_budget(flow.turn, room)
                    break
        for flow in aside:
            queue.restore(flow)
        return bool(aside), starved

    def _serve_due(self, lanes: Lanes, workers: list[WorkerState], now_s: float, decisions: list[Decision]) -> bool:
        """Batch work that has earned its turn, or pages that would expire; returns whether others must wait."""
        queue = lanes.batch
        while room := [worker for worker in workers if self._has_room(worker, batch=True)]:
            flow = queue.take(now_s)
            if flow is None or flow.turn is None:
                return False
            entry = flow.turn
            expiring = entry.handoff is not None and now_s - entry.since_s >= entry.lease_until_s - now_s
            if not expiring and not lanes.batch_due(self._ledger.costs.estimate(entry)):
                queue.restore(flow)
                return False
            worker = self._next(lanes, queue, flow, room, workers, now_s, decisions)
            if worker is None and flow.turn is not None:
                queue.restore(flow)
                return not self._patient(entry, now_s)
        return False

    def _next(
        self,
        lanes: Lanes,
        queue: FairQueue[Entry],
        flow: Flow[Entry],
        room: list[WorkerState],
        workers: list[WorkerState],
        now_s: float,
        decisions: list[Decision],
    ) -> WorkerState | None:
        """Decide about the flow's turn; returns the worker that got it. A turn that is left must be restored."""
        entry = flow.turn
        assert entry is not None
        if not entry.counted and self._ledger.budgets.tenant_full(flow.tenant):
            queue.park(flow)
        elif (worker := self._choose(entry, room, now_s)) is not None:
            decisions.append(self._grant(lanes, queue, flow, worker, now_s))
            return worker
        elif message := self._never(entry, workers):
            decisions.append(Unservable(queue.serve(flow, 0.0), message))
        elif entry.blocked_since_s is None:
            entry.blocked_since_s = now_s
        return None

    def _grant(
        self, lanes: Lanes, queue: FairQueue[Entry], flow: Flow[Entry], worker: WorkerState, now_s: float
    ) -> Granted:
        entry = flow.turn
        assert entry is not None
        self._placement.granted(entry, worker)
        cost = 0.0 if entry.paid else self._ledger.costs.estimate(entry)
        queue.serve(flow, cost)
        lanes.served(queue, cost)
        if cost:
            entry.charges.append(Charge(queue, cost))
        waited_s = now_s - entry.since_s
        budgets = self._ledger.budgets
        if self._settings.max_kv_hbm_bytes is not None:
            self._kv_left -= budgets.kv_bytes_for(entry, worker)
        budgets.wire.passes(entry, now_s)
        self._ledger.grant(entry, worker, now_s)
        return Granted(entry, worker, waited_s)

    def _choose(self, entry: Entry, room: list[WorkerState], now_s: float) -> WorkerState | None:
        """The worker that takes it now; None if it has to wait."""
        budgets, reserved = self._ledger.budgets, self._settings.reserved_output_tokens
        if not budgets.has_tokens_for(entry):
            return None
        if not budgets.wire.may_pass(entry, now_s):
            self.wake_s = now_s + budgets.wire.wait_s(entry, now_s)
            return None
        work_tokens = self._placement.work_tokens
        able = [worker for worker in room if worker.fits(entry, reserved, work_tokens) and worker.serves(entry)]
        if self._settings.max_kv_hbm_bytes is not None:
            able = [worker for worker in able if self._has_kv_for(entry, worker)]
        if entry.ahead in able:
            return entry.ahead
        return cheapest(entry, able, self._placement, self._rng)

    def choose_ahead(self, entry: Entry, fingerprint: str, now_s: float) -> WorkerState | None:
        """The decode worker that the request would get if it were prefilled by now and nobody waited before it."""
        lanes = self._ledger.decode_queues.get(fingerprint)
        if lanes is not None and lanes.size:
            return None
        self._begin(now_s)
        workers = self._pools.decode_workers(fingerprint)
        room = [worker for worker in workers if self._has_room(worker, batch=entry.is_batch)]
        return self._choose(entry, room, now_s)

    def _has_room(self, worker: WorkerState, *, batch: bool = False) -> bool:
        if not worker.has_room() or self._ledger.budgets.stage_full(worker.stage):
            return False
        return not batch or worker.has_batch_slot(self._settings.min_decode_slots)

    def _patient(self, entry: Entry, now_s: float) -> bool:
        """Whether others may still overtake a request that does not fit."""
        return (
            entry.is_suspect
            or entry.blocked_since_s is None
            or now_s - entry.blocked_since_s < self._settings.bypass_s
        )

    def _awaits_budget(self, entry: Entry, room: list[WorkerState]) -> bool:
        """Whether a cluster-wide budget is what the request lacks, so that other engines' requests must wait too."""
        if not self._ledger.budgets.has_tokens_for(entry):
            return True
        return not any(self._has_kv_for(entry, worker) for worker in room)

    def _has_kv_for(self, entry: Entry, worker: WorkerState) -> bool:
        """Whether ``max_kv_hbm_bytes`` has room for it there. What needs no more than was set aside for it always
        has: outputs that grew beyond what was reserved for them must not keep pages that are held from moving on."""
        taken = self._ledger.budgets.kv_bytes_for(entry, worker)
        return taken <= max(0.0, self._kv_left)

    def _never(self, entry: Entry, workers: list[WorkerState]) -> str:
        """Why no live worker could ever serve the request; empty if one could."""
        if entry.handoff is not None:
            return ""
        if not self._ledger.budgets.could_ever_have(entry):
            bound = self._settings.max_tokens_in_flight
            return f"prompt and max_tokens are {entry.bound_tokens} tokens, max_tokens_in_flight allows {bound}"
        hbm = self._settings.max_kv_hbm_bytes
        if hbm is not None and workers:
            least = min(self._ledger.budgets.kv_bytes_for(entry, worker) for worker in workers)
            if least > hbm:
                return f"its KV pages take {least} bytes, max_kv_hbm_gb allows {hbm}"
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
