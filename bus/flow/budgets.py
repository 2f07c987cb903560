"""Cluster-wide and per-tenant sums over the requests in progress, and their bounds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from llmserve.bus.flow.entry import ON_WORKER, Entry
from llmserve.bus.flow.settings import RouterSettings
from llmserve.bus.messages import Stage


class Budgets:
    """A request counts from its first grant until it ends, is lost or returns to the queue."""

    def __init__(self, settings: RouterSettings) -> None:
        self._settings = settings
        self.tokens_in_flight = 0
        self.on_workers: Counter[Stage] = Counter()
        """Granted and running requests by stage."""
        self.in_progress: Counter[str] = Counter()
        """Requests in progress by tenant."""

    def count(self, entry: Entry) -> None:
        if not entry.counted:
            entry.counted = True
            self.tokens_in_flight += entry.bound_tokens
            self.in_progress[entry.tenant] += 1

    def uncount(self, entry: Entry) -> bool:
        """Returns whether the tenant stood at its bound until now."""
        if not entry.counted:
            return False
        entry.counted = False
        at_bound = self.tenant_full(entry.tenant)
        self.tokens_in_flight -= entry.bound_tokens
        self.in_progress[entry.tenant] -= 1
        if not self.in_progress[entry.tenant]:
            del self.in_progress[entry.tenant]
        return at_bound

    def tenant_full(self, tenant: str) -> bool:
        bound = self._settings.tenant(tenant).max_concurrency
        return bound is not None and self.in_progress[tenant] >= bound

    def stage_full(self, stage: Stage) -> bool:
        """Whether no further request may be granted in ``stage``."""
        if stage is Stage.PREFILL:
            bound = self._settings.max_prefill_concurrency
            return bound is not None and self.on_workers[stage] >= bound
        bound = self._settings.max_decode_concurrency
        return bound is not None and self.on_workers[Stage.DECODE] + self.on_workers[Stage.WHOLE] >= bound

    def has_tokens_for(self, entry: Entry) -> bool:
        bound = self._settings.max_tokens_in_flight
        return bound is None or entry.counted or self.tokens_in_flight + entry.bound_tokens <= bound

    def could_ever_have(self, entry: Entry) -> bool:
        bound = self._settings.max_tokens_in_flight
        return bound is None or entry.bound_tokens <= bound

    def check(self, entries: Iterable[Entry]) -> None:
        """Assert the invariants against all known requests."""
        entries = list(entries)
        counted = [entry for entry in entries if entry.counted]
        assert self.tokens_in_flight == sum(entry.bound_tokens for entry in counted), "tokens in flight"
        tenants = Counter(entry.tenant for entry in counted)
        assert +self.in_progress == tenants, "requests in progress"
        stages = Counter(entry.stage for entry in entries if entry.place in ON_WORKER)
        assert +self.on_workers == stages, "requests on workers"
        assert all(number >= 0 for number in self.on_workers.values()), "negative concurrency"
