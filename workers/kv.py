"""The kv role: the manager of a node's KV memory.

Today it has one duty, since the tiers below the GPU are not built yet: engines that were killed leave their shared
memory behind, and what no process maps is given back to the node.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter

from llmserve.workers.engine import shm


class KvManager:
    """Sweeps the node's shared memory every ``every_s`` seconds and counts what it gave back."""

    def __init__(
        self, registry: CollectorRegistry, every_s: float = 60.0, sweep: Callable[[], int] = shm.sweep
    ) -> None:
        self._every_s = every_s
        self._sweep = sweep
        self._reclaimed = Counter(
            "llmserve_shared_memory_reclaimed_bytes", "Shared memory of dead engines given back", registry=registry
        )

    async def run(self) -> None:
        """Sweep until cancelled."""
        while True:
            self._reclaimed.inc(await asyncio.to_thread(self._sweep))
            await asyncio.sleep(self._every_s)
