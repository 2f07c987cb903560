"""The bus as Prometheus sees it: one member's connection."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from llmserve.bus.base import BusUnavailable
from llmserve.bus.nats import NatsBus

logger = logging.getLogger(__name__)

SAMPLE_S = 5.0
_BUCKETS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0)
_COUNTERS = {
    "reconnects": "Times that the connection came back",
    "dropped_publishes": "Messages given up while the server was away",
    "malformed": "Messages that could not be read",
    "handler_errors": "Messages whose handling failed",
}


class BusMetrics(Collector):
    """Counters of every connection that was added, and the round trip to the server."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._buses: list[NatsBus] = []
        self._round_trip = Histogram(
            "llmserve_nats_round_trip_seconds",
            "A message to the server and back",
            buckets=_BUCKETS,
            registry=registry,
        )
        registry.register(self)

    def add(self, bus: NatsBus) -> None:
        """Count what happens on this connection."""
        self._buses.append(bus)

    def collect(self) -> Iterator[Metric]:
        for name, text in _COUNTERS.items():
            family = CounterMetricFamily(f"llmserve_bus_{name}", text)
            family.add_metric([], sum(getattr(bus.counters, name) for bus in self._buses))
            yield family

    async def run(self) -> None:
        """Sample the round trip of the first connection until cancelled."""
        while True:
            if self._buses:
                try:
                    self._round_trip.observe(await self._buses[0].round_trip_s())
                except BusUnavailable as error:
                    logger.warning("no round trip to the bus: %s", error)
            await asyncio.sleep(SAMPLE_S)
