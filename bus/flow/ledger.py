"""All known requests and members, and the moves of a request from one place to the next."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

from llmserve.bus.flow.budgets import Budgets
from llmserve.bus.flow.costs import Costs
from llmserve.bus.flow.credits import Stray, WorkerState
from llmserve.bus.flow.entry import IN_ORDER, ON_WORKER, Charge, Entry, Place
from llmserve.bus.flow.flows import Order, Share
from llmserve.bus.flow.lanes import Lanes
from llmserve.bus.flow.queue import FairQueue
from llmserve.bus.flow.settings import RouterSettings
from llmserve.bus.flow.timers import Timers
from llmserve.bus.messages import HandedOff, Stage

PROMOTE = 0.8
"""Part of ``max_wait_s`` after which a request goes first in its tenant; the rest is for those before it."""
PROMOTE_HANDOFF_S = 5.0
"""The same for handoffs: one that shorter ones overtake until its lease ends is computed again."""


@dataclass(slots=True)
class GatewayState:
    """A gateway and the requests it waits for."""

    last_beat_s: float
    requests: dict[int, Entry] = field(default_factory=dict)


class Ledger:
    """Moves keep queues, books, budgets and timers consistent; they decide nothing."""

    def __init__(self, settings: RouterSettings) -> None:
        self.settings = settings
        self.budgets = Budgets(settings)
        self.costs = Costs(settings)
        self.timers = Timers()
        self.entries: dict[int, Entry] = {}
        self.by_request: dict[str, Entry] = {}
        self.workers: dict[str, WorkerState] = {}
        self.gateways: dict[str, GatewayState] = {}
        self._tickets = itertools.count(1)
        self.first_queues: dict[str, Lanes] = {}
        """Requests that wait for a prefill worker or one of both roles, by engine API."""
        self.decode_queues: dict[str, Lanes] = {}
        """Handoffs that wait for a decode worker, by fingerprint of their pages."""

    def first_queue(self, entry: Entry) -> FairQueue[Entry]:
        """Where the request waits for its first worker."""
        lanes = self.first_queues.get(entry.api)
        if lanes is None:
            lanes = self.first_queues[entry.api] = self._lanes(self._share, math.inf)
        return lanes.lane(entry.klass)

    def decode_queue(self, entry: Entry, fingerprint: str) -> FairQueue[Entry]:
        """Where its handoff waits for a decode worker; its first token is there, so no SLO has a say any more."""
        lanes = self.decode_queues.get(fingerprint)
        if lanes is None:
            lanes = self.decode_queues[fingerprint] = self._lanes(self._share_by_weight, PROMOTE_HANDOFF_S)
        return lanes.lane(entry.klass)

    def add(self, entry: Entry) -> None:
        """Know a new attempt; it must be moved to a place next."""
        self.entries[entry.seq] = entry
        self.by_request[entry.request_id] = entry
        gateway = self.gateways.setdefault(entry.gateway, GatewayState(entry.seen_s))
        gateway.requests[entry.seq] = entry

    def queue(self, entry: Entry, now_s: float) -> None:
        """Wait for the first worker."""
        self._detach(entry)
        self._uncount(entry)
        entry.ahead = None
        entry.move(Place.QUEUED, now_s)
        entry.queue = self.first_queue(entry)
        entry.queue.push(entry, self.costs.estimate(entry))
        self.timers.set(entry.seen_s + min(self.settings.queue_deadline_s, self.patience_s(entry)), entry)

    def patience_s(self, entry: Entry) -> float:
        """How long a request may be queued, by the manifest. A later attempt has begun, batch work may wait."""
        limit_s = self.settings.reject_after_s
        return math.inf if limit_s is None or entry.attempt or entry.is_batch else limit_s

    def wait(self, entry: Entry, handoff: HandedOff, holder: WorkerState, lease_until_s: float, now_s: float) -> None:
        """Wait for a decode worker, until ``lease_until_s``."""
        self._detach(entry)
        self.budgets.count(entry)
        entry.move(Place.WAITING, now_s)
        entry.handoff, entry.holder, entry.lease_until_s = handoff, holder, lease_until_s
        holder.hold(entry, self._pages(entry, holder))
        self.budgets.wire.learn(entry)
        self._set_aside(entry, holder)
        entry.queue = self.decode_queue(entry, holder.beat.fingerprint)
        entry.paid = entry.attempt > 0 or any(charge.queue is entry.queue for charge in entry.charges)
        entry.queue.push(entry, self.costs.estimate(entry))
        self.timers.set(lease_until_s, entry)

    def grant(self, entry: Entry, worker: WorkerState, now_s: float) -> None:
        """Sent to a worker; the entry was served from its queue."""
        self._put_on(entry, worker, worker.stage, Place.GRANTED, now_s)
        self.timers.set(now_s + self.settings.confirm_timeout_s, entry)

    def reserve(self, entry: Entry, worker: WorkerState) -> None:
        """Set room aside at a decode worker, as long as its prefill worker has it."""
        worker.reserve(entry, self._pages(entry, worker))
        self.budgets.give_back_kv(entry)

    def confirm(self, entry: Entry, now_s: float) -> None:
        entry.move(Place.RUNNING, now_s)

    def adopt(self, entry: Entry, worker: WorkerState, stage: Stage, now_s: float) -> None:
        """A worker runs it though it was not sent there by this router."""
        self.stray_ended(worker.member, entry.seq)
        self._put_on(entry, worker, stage, Place.RUNNING, now_s)
        entry.listed = True
        worker.unlisted_pages -= entry.pages
        if not entry.charges and not entry.paid:
            queue, cost = self.first_queue(entry), self.costs.estimate(entry)
            queue.charge(entry.tenant, cost)
            entry.charges.append(Charge(queue, cost))

    def lose(self, entry: Entry, now_s: float, *, stray: bool) -> None:
        """Its gateway has to replace it; ``stray``: its worker may still run it."""
        self._leave(entry, stray=stray)
        entry.move(Place.LOST, now_s)
        self.timers.set(now_s + self.settings.lost_retry_s, entry)

    def forget(self, entry: Entry, *, stray: bool = False) -> None:
        """It is over, or another attempt takes its place; ``stray``: its worker may still run it."""
        self._leave(entry, stray=stray)
        entry.stamp += 1
        entry.data = b""
        del self.entries[entry.seq]
        if self.by_request.get(entry.request_id) is entry:
            del self.by_request[entry.request_id]
        self.gateways[entry.gateway].requests.pop(entry.seq)

    def _leave(self, entry: Entry, *, stray: bool) -> None:
        worker, pages, listed = entry.worker, entry.pages, entry.listed
        self._detach(entry)
        if stray and worker is not None and not worker.gone:
            left = Stray(entry.tenant, entry.stage, entry.prompt_tokens, entry.bound_tokens, pages, listed)
            self._add_stray(worker, entry.seq, left)
        self._uncount(entry)
        entry.handoff = entry.holder = entry.ahead = None

    def recount_strays(self, worker: WorkerState) -> None:
        """After a heartbeat: what its inventory shows besides the book is what it runs besides the book."""
        listed = worker.listed_strays(self.settings.reserved_output_tokens)
        for seq in list(worker.strays):
            self.stray_ended(worker.member, seq)
        for seq, stray in listed.items():
            self._add_stray(worker, seq, stray)

    def stray_ended(self, member: str, seq: int) -> None:
        """The worker does not run it any more, if it did."""
        worker = self.workers.get(member)
        if worker is None or seq not in worker.strays:
            return
        stray = worker.remove_stray(seq)
        if self.budgets.uncount_stray(stray):
            self._unpark(stray.tenant)

    def drop_worker(self, worker: WorkerState) -> None:
        """It is gone; its book and what it holds are the caller's to move."""
        for seq in list(worker.strays):
            self.stray_ended(worker.member, seq)
        for seq in worker.reserved:
            entry = self.entries[seq]
            assert entry.worker is not None
            self.budgets.set_aside_kv(entry, entry.worker)
        worker.gone = True
        del self.workers[worker.member]

    def _add_stray(self, worker: WorkerState, seq: int, stray: Stray) -> None:
        worker.add_stray(seq, stray)
        self.budgets.count_stray(stray)

    def settle(self, entry: Entry, output_tokens: int, cached_tokens: int, moved_bytes: int = 0) -> None:
        """Replace the estimates that the tenant was charged by the real cost."""
        actual = self.costs.actual(entry, output_tokens, cached_tokens, moved_bytes)
        for charge in entry.charges:
            charge.queue.settle(entry.tenant, actual - charge.cost)
        entry.charges.clear()

    def _put_on(self, entry: Entry, worker: WorkerState, stage: Stage, place: Place, now_s: float) -> None:
        self._detach(entry)
        self.budgets.count(entry)
        entry.move(place, now_s)
        entry.stage = stage
        worker.take(entry, self._pages(entry, worker))
        self.budgets.on_workers[stage] += 1
        if stage is Stage.PREFILL:
            self._set_aside(entry, worker)
        else:
            self._give_back(entry)

    def _set_aside(self, entry: Entry, worker: WorkerState) -> None:
        """For its decode elsewhere: room for its pages, and time on the wire."""
        self.budgets.set_aside_kv(entry, worker)
        self.budgets.wire.put_ahead(entry, worker)

    def _give_back(self, entry: Entry) -> None:
        self.budgets.give_back_kv(entry)
        self.budgets.wire.take_away(entry)

    def _pages(self, entry: Entry, worker: WorkerState) -> int:
        return worker.pages_for(entry.prompt_tokens, entry.max_tokens, self.settings.reserved_output_tokens)

    def _detach(self, entry: Entry) -> None:
        if entry.ticket and entry.queue is not None:
            entry.queue.remove(entry)
        if entry.place is Place.WAITING and entry.holder is not None:
            entry.holder.let_go(entry)
        if entry.worker is not None:
            entry.worker.release(entry)
            self.budgets.on_workers[entry.stage] -= 1

    def _uncount(self, entry: Entry) -> None:
        self._give_back(entry)
        if self.budgets.uncount(entry):
            self._unpark(entry.tenant)

    def _unpark(self, tenant: str) -> None:
        for queue in self.first_queues.values():
            queue.unpark(tenant)

    def _lanes(self, share_of: Callable[[str], Share], promote_s: float) -> Lanes:
        settings = self.settings
        promote_s = min(promote_s, PROMOTE * settings.max_wait_s)
        order = Order(settings.aging_tokens_per_s, promote_s, settings.slo_lead_tokens)
        return Lanes(lambda: FairQueue(share_of, self._tickets, order), settings.batch_share)

    def _share(self, tenant: str) -> Share:
        settings = self.settings.tenant(tenant)
        return Share(settings.weight, settings.ttft_slo_s)

    def _share_by_weight(self, tenant: str) -> Share:
        return Share(self.settings.tenant(tenant).weight)

    def check(self) -> None:
        """Assert every invariant; linear in all that is known."""
        strays = [stray for worker in self.workers.values() for stray in worker.strays.values()]
        self.budgets.check(self.entries.values(), strays)
        for worker in self.workers.values():
            worker.check()
            assert not worker.gone, f"{worker.member}: gone and known"
            for seq in worker.reserved:
                entry = self.entries[seq]
                assert entry.ahead is worker, f"{seq}: room is set aside at {worker.member}"
                assert entry.worker is not None, f"{seq}: room is set aside for what nobody prefills"
        queues = []
        for lanes in (*self.first_queues.values(), *self.decode_queues.values()):
            lanes.check()
            queues += [lanes.interactive, lanes.batch]
            for entry in lanes.items():
                assert self.entries.get(entry.seq) is entry, f"{entry.seq}: queued and unknown"
        for seq, entry in self.entries.items():
            assert entry.seq == seq
            assert self.by_request[entry.request_id] is entry, f"{seq}: two attempts of one request"
            assert self.gateways[entry.gateway].requests[seq] is entry, f"{seq}: its gateway does not know it"
            self._check_place(entry, queues)
        assert len(self.by_request) == len(self.entries)
        assert sum(len(gateway.requests) for gateway in self.gateways.values()) == len(self.entries)

    def _check_place(self, entry: Entry, queues: list[FairQueue[Entry]]) -> None:
        seq, place = entry.seq, entry.place
        assert bool(entry.ticket) == (place in IN_ORDER), f"{seq}: {place} with ticket {entry.ticket}"
        assert (entry.worker is not None) == (place in ON_WORKER), f"{seq}: {place} on {entry.worker}"
        assert entry.counted == (place in ON_WORKER or place is Place.WAITING), f"{seq}: {place}, counted wrongly"
        if entry.ticket:
            assert entry.queue in queues, f"{seq}: in no known queue"
        if entry.worker is not None:
            assert entry.worker.book[seq] is entry, f"{seq}: not in its worker's book"
            assert not (entry.worker.gone and place is Place.RUNNING), f"{seq}: runs on a worker that is gone"
        self._check_set_aside(entry)
        if place is Place.WAITING:
            assert entry.holder is not None, f"{seq}: waits without pages"
            assert entry.holder.holding[seq] is entry, f"{seq}: its holder does not know"
            assert not entry.holder.gone, f"{seq}: its holder is gone"

    def _check_set_aside(self, entry: Entry) -> None:
        """Once for each decode that is to come: with the budget, or by the worker that fetches its pages already."""
        fetching = entry.ahead is not None and not entry.ahead.gone and entry.seq in entry.ahead.reserved
        kept = entry.worker or entry.holder
        pages = 0
        if entry.before_decode and not fetching and kept is not None and self.settings.max_kv_hbm_bytes is not None:
            reserved = self.settings.reserved_output_tokens
            pages = kept.pages_to_decode(entry.prompt_tokens, entry.max_tokens, reserved)
        assert bool(entry.decode_kv_bytes) == bool(pages), f"{entry.seq}: {entry.decode_kv_bytes} set aside"
