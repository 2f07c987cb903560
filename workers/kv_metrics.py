"""What the kv role shows of the storage classes, by ``tier``."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge


class StorageMetrics:
    """See the names."""

    def __init__(self, registry: CollectorRegistry) -> None:
        tier = ("tier",)
        self.pages = Gauge("llmserve_storage_pages", "Pages in the tier", tier, registry=registry)
        self.size = Gauge(
            "llmserve_storage_bytes", "Bytes of the pages in the tier, as stored", tier, registry=registry
        )
        self.moves = Counter("llmserve_storage_moves", "Orders carried out", (*tier, "kind"), registry=registry)
        self.failures = Counter(
            "llmserve_storage_failures", "Orders and listings that failed", tier, registry=registry
        )
        self.errors = Counter(
            "llmserve_storage_errors",
            "What the kv role went on after, but should not meet: defects, and messages that were not sent",
            ("what",),
            registry=registry,
        )
        self.out_of_use = Gauge(
            "llmserve_storage_out_of_use", "1 while the tier is left alone since it fails", tier, registry=registry
        )
        self.listing_s = Gauge(
            "llmserve_storage_listing_seconds", "Time that the last listing took", tier, registry=registry
        )

    def show(self, name: str, pages: int, size_bytes: float, *, out_of_use: bool) -> None:
        """How a class stands now."""
        self.pages.labels(name).set(pages)
        self.size.labels(name).set(size_bytes)
        self.out_of_use.labels(name).set(out_of_use)
