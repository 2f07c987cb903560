"""Which workers a queue may use now: prefill only as far ahead as its pages find a decode worker in time."""

from __future__ import annotations

from llmserve.bus.flow.credits import WorkerState
from llmserve.bus.flow.ledger import Ledger
from llmserve.bus.messages import Stage

LEAST_AHEAD = 4
"""Handoffs that may always wait for a busy decode pool."""


class Pools:
    """The workers of each stage, engine API and kind of pages."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._settings = ledger.settings

    def decode_workers(self, fingerprint: str) -> list[WorkerState]:
        return [
            worker
            for worker in self._ledger.workers.values()
            if worker.stage is Stage.DECODE and worker.beat.fingerprint == fingerprint
        ]

    def first_workers(self, api: str, *, batch: bool) -> list[WorkerState]:
        """Prefill workers only while their handoffs would find a decode worker within their lease."""
        queues = self._ledger.decode_queues
        ahead: dict[str, int] | None = None
        workers = []
        for worker in self._ledger.workers.values():
            if worker.stage is Stage.DECODE or worker.beat.api != api:
                continue
            if worker.stage is Stage.WHOLE:
                workers.append(worker)
                continue
            if ahead is None:
                ahead = self._batch_handoffs_ahead() if batch else self._handoffs_ahead()
            fingerprint = worker.beat.fingerprint
            lanes = queues.get(fingerprint)
            waiting = 0 if lanes is None else (lanes.batch if batch else lanes.interactive).size
            if waiting < ahead.get(fingerprint, 0):
                workers.append(worker)
        return workers

    def _handoffs_ahead(self) -> dict[str, int]:
        """Handoffs that may wait for decode workers, by fingerprint: a quarter of what these run at once, so that
        a wait is about a quarter of a request's time and far below a lease. None without a decode worker."""
        bound = self._settings.max_decode_concurrency
        slots = self._decode_slots(0)
        return {
            fingerprint: max(LEAST_AHEAD, min(number, bound or number) // 4) for fingerprint, number in slots.items()
        }

    def _batch_handoffs_ahead(self) -> dict[str, int]:
        """The same for batch work: one while interactive handoffs wait, which it can hardly overtake."""
        ahead = {}
        for fingerprint, number in self._decode_slots(self._settings.min_decode_slots).items():
            lanes = self._ledger.decode_queues.get(fingerprint)
            contended = lanes is not None and lanes.interactive.size > 0
            ahead[fingerprint] = min(number, 1 if contended else LEAST_AHEAD)
        return ahead

    def _decode_slots(self, spared: int) -> dict[str, int]:
        """Slots of all decode workers by fingerprint, without ``spared`` of each worker."""
        slots: dict[str, int] = {}
        for worker in self._ledger.workers.values():
            if worker.stage is Stage.DECODE and not worker.beat.draining:
                fingerprint = worker.beat.fingerprint
                slots[fingerprint] = slots.get(fingerprint, 0) + max(0, worker.beat.slots - spared)
        return slots
