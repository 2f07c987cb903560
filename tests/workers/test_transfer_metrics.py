"""Transfers in the metrics: by engine and direction, and to whose account."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from llmserve.bus.messages import Role
from llmserve.workers.engine.base import Step, Transfer
from llmserve.workers.metrics import WorkerMetrics

MIB = 1 << 20


def test_bytes_speed_failures_and_tenants() -> None:
    registry = CollectorRegistry()
    metrics = WorkerMetrics(registry).of("d0", Role.DECODE)
    moved = [
        Transfer("same_host", "pull", 0, 0.5, "peer", "r1.0"),
        Transfer("nixl", "push", 4 * MIB, 0.5, "", "r1.0"),
        Transfer("nixl", "push", 1000, 0.5, "", "r2.0"),
    ]
    metrics.stepped(Step(transfers=moved), None, {"r1.0": "alice", "r2.0": "bob"}.__getitem__)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, {"worker": "d0", "role": "decode", **labels})

    way = {"engine": "nixl", "direction": "push"}
    assert value("llmserve_transfer_bytes_total", **way) == 4 * MIB + 1000
    assert value("llmserve_transfer_seconds_count", **way) == 2
    assert value("llmserve_transfer_bytes_per_second_count", **way) == 1
    assert value("llmserve_transfer_bytes_per_second_sum", **way) == 8 * MIB
    assert value("llmserve_transfer_tenant_bytes_total", tenant="alice") == 4 * MIB
    assert value("llmserve_transfer_tenant_bytes_total", tenant="bob") == 1000
    assert value("llmserve_transfer_failures_total", engine="same_host", direction="pull", kind="peer") == 1
