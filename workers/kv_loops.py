"""What the kv role does again and again, and goes on doing whatever happens."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from llmserve.workers.kv_metrics import StorageMetrics

logger = logging.getLogger(__name__)


async def again_and_again(
    what: str, step: Callable[[], Awaitable[float]], metrics: StorageMetrics, *, retry_s: float
) -> None:
    """Take ``step``, which says after how many seconds the next one is due, until cancelled.

    An exception is logged and counted, and the next step comes after ``retry_s``: requests are served without it, and
    the next one may do better.
    """
    while True:
        try:
            pause_s = await step()
        except Exception:
            metrics.errors.labels(what).inc()
            logger.exception("the kv role: %s failed, again in %g s", what, retry_s)
            pause_s = retry_s
        await asyncio.sleep(pause_s)
