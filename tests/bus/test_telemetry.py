"""Log lines, the metrics server, and what a bus tells about itself."""

from __future__ import annotations

import asyncio
import json
import logging
import urllib.error
import urllib.request
from collections.abc import AsyncIterator

import nats
import pytest
from prometheus_client import CollectorRegistry, Counter

from llmserve.bus.base import BusError
from llmserve.bus.metrics import BusMetrics
from llmserve.bus.nats import connect
from llmserve.bus.server import EmbeddedServer
from llmserve.bus.telemetry import JsonLines, MetricsServer, TextLines
from tests.bus.samples import login, until


def a_record(**extra: object) -> logging.LogRecord:
    return logging.getLogger("llmserve.test").makeRecord(
        "llmserve.test", logging.WARNING, "file", 1, "lost %d", (3,), None, extra=extra
    )


def test_a_json_line_carries_the_message_and_every_field() -> None:
    line = json.loads(JsonLines().format(a_record(request_id="abc", tokens=5)))
    assert line["message"] == "lost 3"
    assert line["level"] == "warning"
    assert (line["request_id"], line["tokens"]) == ("abc", 5)


def test_a_text_line_ends_in_its_fields() -> None:
    assert TextLines().format(a_record(request_id="abc")).endswith("llmserve.test: lost 3 request_id=abc")


@pytest.fixture
async def metrics_server() -> AsyncIterator[MetricsServer]:
    registry = CollectorRegistry()
    Counter("llmserve_things", "Things.", registry=registry).inc(7)
    server = MetricsServer(registry, "127.0.0.1", 0)
    await server.start()
    yield server
    await server.stop()


async def get(url: str) -> str:
    def read() -> str:
        with urllib.request.urlopen(url, timeout=5) as response:
            return str(response.read().decode())

    return await asyncio.to_thread(read)


async def test_metrics_are_served_as_prometheus_text(metrics_server: MetricsServer) -> None:
    assert "llmserve_things_total 7.0" in (await get(metrics_server.url)).splitlines()


async def test_other_paths_are_not_found(metrics_server: MetricsServer) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404"):
        await get(metrics_server.url.replace("/metrics", "/else"))


async def test_a_taken_metrics_port_is_one_line(metrics_server: MetricsServer) -> None:
    with pytest.raises(BusError, match=f"metrics port 127.0.0.1:{metrics_server.port}"):
        await MetricsServer(CollectorRegistry(), "127.0.0.1", metrics_server.port).start()


async def test_bus_metrics_show_the_round_trip_and_the_counters_of_all_connections(
    shared_server: EmbeddedServer,
) -> None:
    registry = CollectorRegistry()
    metrics = BusMetrics(registry)
    buses = [await connect(shared_server.url, shared_server.token, "metrics", member=name) for name in ("a", "b")]
    stranger = await nats.connect(shared_server.url, **login(shared_server))
    for bus in buses:
        metrics.add(bus)
        await bus.subscribe(bus.subjects.control, lambda _: None)
        await bus.flush()
    await stranger.publish(buses[0].subjects.control, b"garbage")
    running = asyncio.create_task(metrics.run())
    await until(lambda: registry.get_sample_value("llmserve_nats_round_trip_seconds_count") == 1)
    await until(lambda: registry.get_sample_value("llmserve_bus_malformed_total") == 2)
    running.cancel()
    await stranger.close()
    for bus in buses:
        await bus.close()
