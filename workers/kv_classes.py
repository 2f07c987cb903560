"""One storage class in the kv role's hands: its store, and how much it is relied on."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable

from llmserve.bus.messages import Tier
from llmserve.kvstore.stores.base import PageStore, StoreError
from llmserve.kvstore.stores.breaker import Breaker
from llmserve.workers.kv_metrics import StorageMetrics

logger = logging.getLogger(__name__)


class KeptClass:
    """``number``: its place among the classes, from the fastest to the slowest."""

    def __init__(self, number: int, store: PageStore, tier: Tier, prefetch: bool, metrics: StorageMetrics) -> None:
        self.number = number
        self.store = store
        self.tier = tier
        self.prefetch = prefetch
        self.breaker = Breaker()
        self._metrics = metrics

    @property
    def name(self) -> str:
        """Of the storage class."""
        return self.store.name

    @property
    def room(self) -> int | None:
        """Orders that may be given now, None for any number: one that fails is left alone, then tried with one."""
        if not self.breaker.is_open:
            return None
        return 1 if self.breaker.would_allow(time.monotonic()) else 0

    def allows(self) -> bool:
        """Whether it may be used now; if it failed, to try it."""
        return self.breaker.allows(time.monotonic())

    def count(self, what: str, error: Exception, level: int = logging.WARNING) -> None:
        """Count and log a failure; whatever is no ``StoreError`` is a defect, of ours or of a library."""
        self._metrics.failures.labels(self.name).inc()
        if isinstance(error, StoreError):
            logger.log(level, "%s: %s failed: %s", self.name, what, error)
        else:
            logger.error("%s: %s failed", self.name, what, exc_info=error)

    def failed(self, what: str, error: Exception) -> None:
        """``count``, and leave the class alone if it fails again and again."""
        self.count(what, error)
        if self.breaker.failed(time.monotonic()):
            logger.error("storage class %s is left alone for a while: %s", self.name, error)

    async def guarded(self, what: str, call: Callable[[], Awaitable[object]]) -> bool:
        """Whether the call was made and succeeded."""
        if not self.allows():
            return False
        try:
            await call()
        except Exception as error:
            self.failed(what, error)
            return False
        self.breaker.succeeded()
        return True
