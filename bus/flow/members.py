"""Who is there, and what their inventories say against what the router believes."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmserve.bus.flow.credits import STAGE_OF_ROLE, WorkerState
from llmserve.bus.flow.entry import IN_ORDER, ON_WORKER, Entry, Place
from llmserve.bus.flow.ledger import GatewayState, Ledger
from llmserve.bus.flow.timers import Memory
from llmserve.bus.messages import Heartbeat, Role, Running, Stage


@dataclass(slots=True)
class Report:
    """What follows from one inventory."""

    adopt: list[tuple[Entry, Running]] = field(default_factory=list)
    """Running there, though it is believed to wait."""
    confirm: list[Entry] = field(default_factory=list)
    """Granted there, and its confirmation is still on the way or lost."""
    missing: list[Entry] = field(default_factory=list)
    """Believed to run there: finished, or lost."""
    unheld: list[Entry] = field(default_factory=list)
    """Waiting for a decode worker, and its pages are gone."""
    resync: bool = False
    """A handoff was published and did not arrive."""


class Members:
    """Liveness by heartbeats. Silence counts from the last reconnect of the bus at the earliest."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._settings = ledger.settings
        self._reconnected_s = float("-inf")
        self._absent_since_s: dict[str, float] = {}
        """Since when nobody listens where a member should."""
        self._without_since_s: dict[str, float] = {}
        """Since when a queue's engine API has no worker while others have."""
        self._lacking_since_s: dict[str, float] = {}
        """Since when no workers that stay could take a queue's requests, by engine API."""
        self._unread_since_s: dict[str, float] = {}
        """Since when no decode worker that stays could read a queue's pages, by fingerprint."""

    def hear(self, beat: Heartbeat, now_s: float) -> WorkerState | None:
        """Note that a member is alive; returns its state if it is a worker."""
        self._absent_since_s.pop(beat.member, None)
        if beat.role is Role.GATEWAY:
            self._ledger.gateways.setdefault(beat.member, GatewayState(now_s)).last_beat_s = now_s
            return None
        if beat.role not in STAGE_OF_ROLE:
            return None
        worker = self._ledger.workers.get(beat.member)
        if worker is None:
            worker = self._ledger.workers[beat.member] = WorkerState(beat, now_s)
        worker.hear(beat, now_s)
        return worker

    def reconcile(self, worker: WorkerState, ended: Memory[int], now_s: float) -> Report:
        """Compare the worker's last inventory with its book."""
        report = Report()
        settled_s = now_s - self._settings.inventory_grace_s
        worker.claims = {}
        for line in worker.inventory.values():
            entry = self._ledger.entries.get(line.seq)
            if entry is None:
                if line.seq not in ended:
                    worker.claims[line.seq] = line
            elif entry.attempt == line.attempt:
                self._compare(worker, entry, line, settled_s, report)
        for entry in worker.book.values():
            if entry.seq not in worker.inventory and entry.since_s <= settled_s and not entry.checking:
                report.missing.append(entry)
        for entry in worker.holding.values():
            if entry.seq not in worker.inventory and entry.since_s <= settled_s:
                report.unheld.append(entry)
        return report

    def take_claim(self, entry: Entry) -> tuple[WorkerState, Stage] | None:
        """The worker whose inventory listed the request before it was known; one that only holds its pages comes
        last, since another may decode from them already."""
        claims = []
        for worker in self._ledger.workers.values():
            line = worker.claims.pop(entry.seq, None)
            if line is not None and line.attempt == entry.attempt:
                claims.append((line.held, worker, line.stage))
        if not claims:
            return None
        _, worker, stage = min(claims, key=lambda claim: claim[0])
        return worker, stage

    def _compare(self, worker: WorkerState, entry: Entry, line: Running, settled_s: float, report: Report) -> None:
        if line.held:
            if entry.place is Place.QUEUED:
                report.adopt.append((entry, line))
            elif entry.worker is worker and entry.stage is Stage.PREFILL and entry.since_s <= settled_s:
                report.resync = True
        elif entry.worker is worker:
            if entry.place is Place.GRANTED and entry.stage is line.stage:
                report.confirm.append(entry)
        elif entry.place is Place.QUEUED or (line.stage is Stage.DECODE and self._before_decode(entry)):
            report.adopt.append((entry, line))

    @staticmethod
    def _before_decode(entry: Entry) -> bool:
        """A decode worker that runs it outdoes the prefill worker that still lists it as held."""
        return entry.place in IN_ORDER or (entry.place in ON_WORKER and entry.stage is Stage.PREFILL)

    def reconnected(self, now_s: float) -> None:
        self._reconnected_s = now_s

    @property
    def timeout_s(self) -> float:
        """Silence after which a member is gone."""
        return self._settings.member_timeout_s

    def returning(self, now_s: float) -> bool:
        """Whether the bus was away a moment ago, so that a member that nobody hears may be on its way back."""
        return now_s - self._reconnected_s < self._settings.member_timeout_s

    def absent(self, member: str, now_s: float) -> bool:
        """Note that nobody listens at a member; whether that has been so for too long."""
        if self.returning(now_s):
            return False
        since_s = self._absent_since_s.setdefault(member, now_s)
        settings = self._settings
        is_worker = member in self._ledger.workers
        patience_s = settings.worker_absence_s if is_worker else settings.gateway_absence_s
        if now_s - since_s < patience_s:
            return False
        del self._absent_since_s[member]
        return True

    def silent(self, now_s: float) -> list[str]:
        """Members whose silence has lasted too long."""
        latest_s = now_s - self._settings.member_timeout_s
        if self._reconnected_s > latest_s:
            return []
        workers = [name for name, worker in self._ledger.workers.items() if worker.last_beat_s < latest_s]
        gateways = [name for name, gateway in self._ledger.gateways.items() if gateway.last_beat_s < latest_s]
        return workers + gateways

    def without_workers(self, now_s: float) -> list[tuple[Entry, str]]:
        """Queued requests whose engine API no worker has, though there are workers, for as long as a silent
        worker may take to be noticed."""
        served = {worker.beat.api for worker in self._ledger.workers.values() if worker.stage is not Stage.DECODE}
        hopeless: list[tuple[Entry, str]] = []
        for api, queue in self._ledger.first_queues.items():
            if not served or api in served or not queue.size:
                self._without_since_s.pop(api, None)
            elif now_s - self._without_since_s.setdefault(api, now_s) >= self._settings.member_timeout_s:
                hopeless += [(entry, api) for entry in queue.items()]
        return hopeless

    def unavailable(self, now_s: float) -> list[tuple[Entry, str]]:
        """What a role has been missing for too long, and the role: queued later attempts, and handoffs that are
        stranded and for which another attempt would only wait again."""
        patience_s = self._settings.retry_patience_s
        overdue: list[tuple[Entry, str]] = []
        for api, queue in self._ledger.first_queues.items():
            role = self._lacking_role(api) if queue.size else ""
            if not role:
                self._lacking_since_s.pop(api, None)
                continue
            since_s = self._lacking_since_s.setdefault(api, now_s)
            if now_s - since_s >= patience_s:
                overdue += [(e, role) for e in queue.items() if e.attempt > 0 and now_s - e.seen_s >= patience_s]
        overdue += [(e, role) for e in self._unread(now_s) if (role := self._lacking_role(e.api))]
        return overdue

    def stranded(self, now_s: float) -> list[Entry]:
        """Handoffs whose pages no decode worker could read for too long, while another attempt could be served."""
        return [entry for entry in self._unread(now_s) if not self._lacking_role(entry.api)]

    def _unread(self, now_s: float) -> list[Entry]:
        """Handoffs that have waited for a decode worker of their fingerprint without there being one."""
        decoding = self._decoding()
        unread: list[Entry] = []
        for fingerprint, queue in self._ledger.decode_queues.items():
            if fingerprint in decoding or not queue.size:
                self._unread_since_s.pop(fingerprint, None)
            elif now_s - self._unread_since_s.setdefault(fingerprint, now_s) >= self._settings.retry_patience_s:
                unread += queue.items()
        return unread

    def _decoding(self) -> set[str]:
        """Fingerprints that decode workers which stay can read."""
        workers = self._ledger.workers.values()
        return {w.beat.fingerprint for w in workers if w.stage is Stage.DECODE and not w.beat.draining}

    def _lacking_role(self, api: str) -> str:
        """The role without which no request of ``api`` can run; empty if there are workers for all its stages."""
        staying = [worker for worker in self._ledger.workers.values() if not worker.beat.draining]
        first = [worker for worker in staying if worker.stage is not Stage.DECODE and worker.beat.api == api]
        if not first:
            return "prefill or both"
        decoding = self._decoding()
        served = any(worker.stage is Stage.WHOLE or worker.beat.fingerprint in decoding for worker in first)
        return "" if served else "decode"

    def unanswered(self, epoch: int) -> list[str]:
        """Workers that were heard and have not shown that they know ``epoch``."""
        return [name for name, worker in self._ledger.workers.items() if worker.beat.epoch < epoch]

    def unclaimed(self) -> int:
        """Requests that wait and that no worker has claimed to run."""
        return sum(1 for entry in self._ledger.entries.values() if entry.place is Place.QUEUED)
