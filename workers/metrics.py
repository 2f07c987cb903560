"""Metrics of the workers of one process, on a registry passed in."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from llmserve.bus.messages import Accepted, Refused, Role
from llmserve.workers.actions import Event, Status
from llmserve.workers.engine.base import EngineLoad, Step, Transfer
from llmserve.workers.state import WorkerState

_STEP_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.3, 2.6, 5.0)
_TRANSFER_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_TRANSFER_BYTES_S = tuple(part * 10.0**power for power in range(7, 12) for part in (1, 2.5, 5))
_RATED_BYTES = 1 << 20
_LABELS = ("worker", "role")
_TIER_COUNTS = {
    "loads": "Pages read from a storage class",
    "load_bytes": "Bytes of pages read, as stored",
    "load_s": "Seconds spent on reading pages",
    "stores": "Pages written to a storage class",
    "store_bytes": "Bytes of pages written, as stored",
    "store_s": "Seconds spent on writing pages",
    "dropped": "Pages that were not written",
    "bad": "Pages that were damaged, and are deleted",
    "failures": "Calls that the storage class refused or did not answer in time",
}
"""By the names of ``kvstore.tiers.TierStats``."""


class WorkerMetrics:
    """All families; ``of`` gives the series of one worker. Make it once a registry.

    ``worker`` is the replica's name, which survives its restarts, so that their number does not grow the registry.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        transfer = (*_LABELS, "engine", "direction")
        self.transfer_bytes = Counter(
            "llmserve_transfer_bytes", "KV bytes moved between engines", transfer, registry=registry
        )
        self.transfer_seconds = Histogram(
            "llmserve_transfer_seconds", "Time of one KV transfer", transfer, buckets=_TRANSFER_S, registry=registry
        )
        self.transfer_rate = Histogram(
            "llmserve_transfer_bytes_per_second",
            "Speed of one KV transfer, of 1 MiB and more",
            transfer,
            buckets=_TRANSFER_BYTES_S,
            registry=registry,
        )
        self.tenant_bytes = Counter(
            "llmserve_transfer_tenant_bytes",
            "KV bytes moved for a tenant's requests",
            (*_LABELS, "tenant"),
            registry=registry,
        )
        self.transfer_failures = Counter(
            "llmserve_transfer_failures", "KV transfers that failed", (*transfer, "kind"), registry=registry
        )
        self.step_seconds = Histogram(
            "llmserve_engine_step_seconds",
            "Time between two outputs of a busy engine",
            _LABELS,
            buckets=_STEP_S,
            registry=registry,
        )
        self.prefill_tokens = Counter("llmserve_prefill_tokens", "Prompt tokens computed", _LABELS, registry=registry)
        self.decode_tokens = Counter("llmserve_decode_tokens", "Output tokens yielded", _LABELS, registry=registry)
        self.requests = Gauge(
            "llmserve_worker_requests", "Requests on the worker", (*_LABELS, "state"), registry=registry
        )
        self.pages = Gauge("llmserve_worker_kv_pages", "KV pages", (*_LABELS, "state"), registry=registry)
        self.page_bytes = Gauge("llmserve_kv_page_bytes", "Size of a KV page", _LABELS, registry=registry)
        self.events = Counter(
            "llmserve_worker_events", "Events sent to the router", (*_LABELS, "event"), registry=registry
        )
        self.failures = Counter(
            "llmserve_worker_failures", "Operations that failed", (*_LABELS, "what"), registry=registry
        )
        self.kv_resyncs = Counter(
            "llmserve_kv_resyncs", "Snapshots of its pages that a worker sent to a router", _LABELS, registry=registry
        )
        self.cached_tokens = Counter(
            "llmserve_prompt_tokens_reused",
            "Prompt tokens that were not computed: found in the engine's own memory (gpu), or loaded from a tier",
            (*_LABELS, "source"),
            registry=registry,
        )
        self.restarts = Counter(
            "llmserve_engine_restarts", "Engines started again after they died", _LABELS, registry=registry
        )
        self.stalls = Counter(
            "llmserve_engine_stalls", "Engines that hung and were called dead", _LABELS, registry=registry
        )

        tier = (*_LABELS, "tier")
        self.tier_counts = {
            what: Counter(f"llmserve_tier_{what}", text, tier, registry=registry)
            for what, text in _TIER_COUNTS.items()
        }
        self.tier_open = Gauge(
            "llmserve_tier_out_of_use", "1 while the tier is left alone since it fails", tier, registry=registry
        )

    def of(self, worker: str, role: Role) -> OneWorker:
        return OneWorker(self, worker, role)


class OneWorker:
    """The series of one worker."""

    def __init__(self, families: WorkerMetrics, worker: str, role: Role) -> None:
        self._families = families
        self._labels = (worker, str(role))
        self._counts_output = role is not Role.PREFILL
        self._step_seconds = families.step_seconds.labels(*self._labels)
        self._prefill_tokens = families.prefill_tokens.labels(*self._labels)
        self._decode_tokens = families.decode_tokens.labels(*self._labels)
        self._counts_reuse = role is not Role.DECODE
        self._restarts = families.restarts.labels(*self._labels)
        self._stalls = families.stalls.labels(*self._labels)

    def stepped(self, step: Step, seconds: float | None, tenant_of: Callable[[str], str] = lambda _: "") -> None:
        """``seconds`` since the last output, None if the engine was idle; ``tenant_of`` names a work id's tenant."""
        if seconds is not None:
            self._step_seconds.observe(seconds)
        if step.prefill_tokens:
            self._prefill_tokens.inc(step.prefill_tokens)
        if self._counts_output:
            self._decode_tokens.inc(sum(len(output.tokens) for output in step.outputs))
        if self._counts_reuse:
            for output in step.outputs:
                if output.cached_tokens:
                    self._reused(output.cached_tokens, output.loaded_tokens)
        for transfer in step.transfers:
            self._transferred(transfer, tenant_of(transfer.work_id))
        for tier, counts in step.tiers.items():
            for what, value in counts.items():
                if what in self._families.tier_counts:
                    self._families.tier_counts[what].labels(*self._labels, tier).inc(value)
            self._families.tier_open.labels(*self._labels, tier).set(counts.get("open", 0))

    def _reused(self, cached_tokens: int, loaded_tokens: int) -> None:
        for source, tokens in (("gpu", cached_tokens - loaded_tokens), ("loaded", loaded_tokens)):
            if tokens > 0:
                self._families.cached_tokens.labels(*self._labels, source).inc(tokens)

    def _transferred(self, transfer: Transfer, tenant: str) -> None:
        labels = (*self._labels, transfer.engine, transfer.direction)
        self._families.transfer_bytes.labels(*labels).inc(transfer.bytes_moved)
        if transfer.failure:
            self._families.transfer_failures.labels(*labels, transfer.failure).inc()
        else:
            self._families.transfer_seconds.labels(*labels).observe(transfer.seconds)
            self._families.tenant_bytes.labels(*self._labels, tenant).inc(transfer.bytes_moved)
            if transfer.bytes_moved >= _RATED_BYTES:
                rate = transfer.bytes_moved / max(transfer.seconds, 1e-9)
                self._families.transfer_rate.labels(*labels).observe(rate)

    def resynced(self) -> None:
        self._families.kv_resyncs.labels(*self._labels).inc()

    def told(self, event: Event) -> None:
        name = type(event).__name__.lower()
        if isinstance(event, Accepted | Refused):
            name = f"{name}_{event.stage}"
        self._families.events.labels(*self._labels, name).inc()

    def failed(self, what: str) -> None:
        self._families.failures.labels(*self._labels, what).inc()

    def restarted(self) -> None:
        self._restarts.inc()

    def stalled(self) -> None:
        self._stalls.inc()

    def show(self, state: WorkerState, load: EngineLoad) -> None:
        """Where the worker stands; once a heartbeat is enough."""
        for status in Status:
            self._families.requests.labels(*self._labels, status.value).set(state.count(status))
        self._families.page_bytes.labels(*self._labels).set(state.info.page_bytes)
        self._pages(load.pages_free, state.info.pages_total - load.pages_free)

    def gone(self) -> None:
        """The worker is away: nothing runs and it has no pages."""
        for status in Status:
            self._families.requests.labels(*self._labels, status.value).set(0)
        self._pages(0, 0)

    def _pages(self, free: int, used: int) -> None:
        self._families.pages.labels(*self._labels, "free").set(free)
        self._families.pages.labels(*self._labels, "used").set(used)
