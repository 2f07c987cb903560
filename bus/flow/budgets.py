"""Cluster-wide and per-tenant sums over the requests in progress, and their bounds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from llmserve.bus.flow.credits import Stray, WorkerState
from llmserve.bus.flow.entry import ON_WORKER, Entry
from llmserve.bus.flow.settings import RouterSettings
from llmserve.bus.flow.wire import Wire
from llmserve.bus.messages import Stage


class Budgets:
    """A request counts from its first grant until it ends, is lost or returns to the queue; a stray while it runs."""

    def __init__(self, settings: RouterSettings) -> None:
        self._settings = settings
        self.tokens_in_flight = 0
        self.on_workers: Counter[Stage] = Counter()
        """Granted and running requests by stage."""
        self.in_progress: Counter[str] = Counter()
        """Requests in progress by tenant."""
        self.wire = Wire(settings)
        self.decode_kv_bytes = 0
        """Set aside for the decode of requests that are prefilled or wait for a decode worker."""
        self.stray_tokens = 0
        self.strays_on_workers: Counter[Stage] = Counter()
        self.strays_in_progress: Counter[str] = Counter()

    def count(self, entry: Entry) -> None:
        if not entry.counted:
            entry.counted = True
            self.tokens_in_flight += entry.bound_tokens
            self.in_progress[entry.tenant] = self.in_progress.get(entry.tenant, 0) + 1

    def uncount(self, entry: Entry) -> bool:
        """Returns whether the tenant stood at its bound until now."""
        if not entry.counted:
            return False
        entry.counted = False
        at_bound = self.tenant_full(entry.tenant)
        self.tokens_in_flight -= entry.bound_tokens
        left = self.in_progress[entry.tenant] - 1
        if left:
            self.in_progress[entry.tenant] = left
        else:
            del self.in_progress[entry.tenant]
        return at_bound

    def count_stray(self, stray: Stray) -> None:
        self.stray_tokens += stray.bound_tokens
        self.strays_on_workers[stray.stage] += 1
        self.strays_in_progress[stray.tenant] += 1

    def uncount_stray(self, stray: Stray) -> bool:
        """Returns whether the tenant stood at its bound until now."""
        at_bound = self.tenant_full(stray.tenant)
        self.stray_tokens -= stray.bound_tokens
        self.strays_on_workers[stray.stage] -= 1
        self.strays_in_progress[stray.tenant] -= 1
        if not self.strays_in_progress[stray.tenant]:
            del self.strays_in_progress[stray.tenant]
        return at_bound

    def tenant_full(self, tenant: str) -> bool:
        bound = self._settings.tenant(tenant).max_concurrency
        return bound is not None and self.in_progress[tenant] + self.strays_in_progress[tenant] >= bound

    def stage_full(self, stage: Stage) -> bool:
        """Whether no further request may be granted in ``stage``."""
        if stage is Stage.PREFILL:
            bound = self._settings.max_prefill_concurrency
            return self.wire.full or (bound is not None and self.running(stage) >= bound)
        bound = self._settings.max_decode_concurrency
        return bound is not None and self.running(Stage.DECODE) + self.running(Stage.WHOLE) >= bound

    def running(self, stage: Stage) -> int:
        """Requests on workers in that stage, strays included."""
        return self.on_workers[stage] + self.strays_on_workers[stage]

    def has_tokens_for(self, entry: Entry) -> bool:
        bound = self._settings.max_tokens_in_flight
        if bound is None or entry.counted:
            return True
        return self.tokens_in_flight + self.stray_tokens + entry.bound_tokens <= bound

    def could_ever_have(self, entry: Entry) -> bool:
        bound = self._settings.max_tokens_in_flight
        return bound is None or entry.bound_tokens <= bound

    def kv_hbm_left(self, workers: Iterable[WorkerState]) -> float:
        """Bytes that KV pages may still take in the memory of all workers together."""
        bound = self._settings.max_kv_hbm_bytes
        if bound is None:
            return math.inf
        used = sum(worker.pages_in_use * worker.beat.page_bytes for worker in workers)
        return bound - used - self.decode_kv_bytes

    def kv_bytes_for(self, entry: Entry, worker: WorkerState) -> int:
        """What a grant of the request to the worker takes of ``max_kv_hbm_bytes`` besides what is set aside for it.

        A prefill takes what its decode needs too: pages that are held would otherwise leave no room for the decode
        that frees them.
        """
        size = entry.prompt_tokens, entry.max_tokens, self._settings.reserved_output_tokens
        pages = worker.pages_for(*size)
        if worker.stage is Stage.PREFILL:
            pages += worker.pages_to_decode(*size)
        return pages * worker.beat.page_bytes - entry.decode_kv_bytes

    def set_aside_kv(self, entry: Entry, worker: WorkerState) -> None:
        """For the decode of what ``worker`` prefills or holds."""
        if self._settings.max_kv_hbm_bytes is not None:
            reserved = self._settings.reserved_output_tokens
            pages = worker.pages_to_decode(entry.prompt_tokens, entry.max_tokens, reserved)
            self._set_kv(entry, pages * worker.beat.page_bytes)

    def give_back_kv(self, entry: Entry) -> None:
        """A decode worker has room for it, or it will not be decoded."""
        self._set_kv(entry, 0)

    def _set_kv(self, entry: Entry, amount: int) -> None:
        self.decode_kv_bytes += amount - entry.decode_kv_bytes
        entry.decode_kv_bytes = amount

    def check(self, entries: Iterable[Entry], strays: Iterable[Stray]) -> None:
        """Assert the invariants against all known requests and all strays of known workers."""
        entries, strays = list(entries), list(strays)
        self.wire.check(entries)
        assert self.decode_kv_bytes == sum(entry.decode_kv_bytes for entry in entries), "set aside for decode"
        counted = [entry for entry in entries if entry.counted]
        assert self.tokens_in_flight == sum(entry.bound_tokens for entry in counted), "tokens in flight"
        tenants = Counter(entry.tenant for entry in counted)
        assert +self.in_progress == tenants, "requests in progress"
        stages = Counter(entry.stage for entry in entries if entry.place in ON_WORKER)
        assert +self.on_workers == stages, "requests on workers"
        assert all(number >= 0 for number in self.on_workers.values()), "negative concurrency"
        assert self.stray_tokens == sum(stray.bound_tokens for stray in strays), "strays' tokens in flight"
        assert +self.strays_in_progress == Counter(stray.tenant for stray in strays), "strays in progress"
        assert +self.strays_on_workers == Counter(stray.stage for stray in strays), "strays on workers"
