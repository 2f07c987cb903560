"""The router's metrics on a registry passed in."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from llmserve.bus.flow.actions import SendGrant
from llmserve.bus.flow.core import RouterCore
from llmserve.bus.flow.lanes import Lanes
from llmserve.bus.flow.locality import Locality
from llmserve.bus.messages import Stage, Tier

DISPATCH_BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class FlowMetrics:
    """Counts what the core counted, and shows where it stands each time ``update`` is called."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._queue_depth = Gauge(
            "llmserve_queue_depth", "Requests that wait", ["stage", "tenant"], registry=registry
        )
        self._tokens = Gauge(
            "llmserve_tokens_in_flight", "Prompt and max_tokens of requests in progress", registry=registry
        )
        self._running = Gauge("llmserve_running", "Requests on workers", ["stage"], registry=registry)
        self._pages = Gauge("llmserve_kv_pages", "KV pages of a worker", ["worker", "state"], registry=registry)
        self._grants = Counter("llmserve_grants", "Grants sent", ["stage"], registry=registry)
        self._unconfirmed = Counter("llmserve_grants_unconfirmed", "Grants never confirmed", registry=registry)
        self._requeued = Counter("llmserve_grants_returned", "Grants refused or undeliverable", registry=registry)
        self._lost = Counter("llmserve_attempts_lost", "Attempts given up", ["cause"], registry=registry)
        self._rejected = Counter(
            "llmserve_requests_rejected", "Requests refused for good", ["code"], registry=registry
        )
        self._failures = Counter(
            "llmserve_router_failures", "Actions or events of the router that failed", ["what"], registry=registry
        )
        dispatch = Histogram(
            "llmserve_dispatch_seconds",
            "From stored, or handed off, to granted",
            ["stage"],
            buckets=DISPATCH_BUCKETS_S,
            registry=registry,
        )
        self._dispatched = {stage: dispatch.labels(stage) for stage in Stage}
        self._prefix_grants = Counter(
            "llmserve_prefix_grants",
            "Prompts granted to a worker that holds a part (hit) or not",
            ["result"],
            registry=registry,
        )
        self._prefix_tokens = Counter(
            "llmserve_prefix_tokens",
            "Prompt tokens granted, by where they are expected from",
            ["source"],
            registry=registry,
        )
        self._index_blocks = Gauge(
            "llmserve_prefix_index_blocks", "Pages whose whereabouts the router knows", registry=registry
        )
        self._held_blocks = Gauge(
            "llmserve_prefix_held_blocks",
            "Pages in the tier as the router knows, once for each member that holds it",
            ("tier",),
            registry=registry,
        )
        self._index_forgotten = Counter(
            "llmserve_prefix_index_forgotten", "Pages dropped from the index for want of room", registry=registry
        )
        self._kv_events = Counter(
            "llmserve_kv_events",
            "Messages about pages (received, lost, malformed), and snapshots (asked, received)",
            ["what"],
            registry=registry,
        )
        self._seen: dict[tuple[str, str], int] = {}
        self._depths: set[tuple[str, str]] = set()
        self._workers: set[str] = set()

    def granted(self, action: SendGrant) -> None:
        self._dispatched[action.grant.stage].observe(action.waited_s)

    def failed(self, what: str) -> None:
        self._failures.labels(what).inc()

    def update(self, core: RouterCore) -> None:
        """Bring every figure up to date; once a second is enough."""
        ledger, stats = core.ledger, core.stats
        self._tokens.set(ledger.budgets.tokens_in_flight)
        for stage in Stage:
            self._running.labels(stage).set(ledger.budgets.on_workers[stage])
            self._advance(self._grants.labels(stage), ("grants", stage), stats.grants[stage])
        self._advance(self._unconfirmed, ("unconfirmed", ""), stats.confirm_timeouts)
        self._advance(self._requeued, ("requeued", ""), stats.requeued)
        for cause, number in stats.attempts_lost.items():
            self._advance(self._lost.labels(cause), ("lost", cause), number)
        for code, number in stats.rejected.items():
            self._advance(self._rejected.labels(code), ("rejected", code), number)
        self._update_depths(core)
        self._update_pages(core)
        self._update_locality(core.locality)

    def _update_locality(self, locality: Locality) -> None:
        stats, index = locality.stats, locality.index
        self._index_blocks.set(len(index))
        sizes = index.sizes()
        for tier in Tier:
            self._held_blocks.labels(tier.value).set(sizes.get(tier, 0))
        self._advance(self._index_forgotten, ("index", "forgotten"), index.forgotten)
        for result, number in (("hit", stats.hits), ("miss", stats.misses)):
            self._advance(self._prefix_grants.labels(result), ("prefix", result), number)
        sources: dict[str, int] = {tier.value: tokens for tier, tokens in stats.reused_tokens.items()}
        sources["computed"] = stats.computed_tokens
        for source, tokens in sources.items():
            self._advance(self._prefix_tokens.labels(source), ("tokens", source), tokens)
        events = {
            "received": stats.events,
            "lost": stats.lost,
            "malformed": stats.malformed,
            "snapshot_asked": stats.asked,
            "snapshot_received": stats.snapshots,
        }
        for what, number in events.items():
            self._advance(self._kv_events.labels(what), ("kv", what), number)

    def _advance(self, counter: Counter, key: tuple[str, str], number: int) -> None:
        counter.inc(number - self._seen.get(key, 0))
        self._seen[key] = number

    def _update_depths(self, core: RouterCore) -> None:
        depths: dict[tuple[str, str], int] = {}
        _add_depths(depths, "prefill", core.ledger.first_queues.values())
        _add_depths(depths, "decode", core.ledger.decode_queues.values())
        for key, depth in depths.items():
            self._queue_depth.labels(*key).set(depth)
        for key in self._depths - depths.keys():
            self._queue_depth.remove(*key)
        self._depths = set(depths)

    def _update_pages(self, core: RouterCore) -> None:
        workers = core.ledger.workers
        for name, worker in workers.items():
            self._pages.labels(name, "used").set(worker.beat.pages_total - worker.beat.pages_free)
            self._pages.labels(name, "total").set(worker.beat.pages_total)
        for name in self._workers - workers.keys():
            self._pages.remove(name, "used")
            self._pages.remove(name, "total")
        self._workers = set(workers)


def _add_depths(depths: dict[tuple[str, str], int], stage: str, queues: Iterable[Lanes]) -> None:
    for queue in queues:
        for tenant, size in queue.sizes():
            depths[stage, tenant] = depths.get((stage, tenant), 0) + size
