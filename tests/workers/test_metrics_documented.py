"""The metrics that the documentation of pages names are those that the processes have."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from llmserve.bus.flow.metrics import FlowMetrics
from llmserve.gateway.metrics import GatewayMetrics
from llmserve.workers.kv_pages import PageKeeper
from llmserve.workers.metrics import WorkerMetrics
from tests.manifests.samples import manifest

DOCS = Path(__file__).parents[2] / "docs"
_NAMED = re.compile(r"`(llmserve)?(_[a-z_]+)(?:\{[a-z,]+\})?`")


@pytest.fixture(scope="module")
def existing(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    registry = CollectorRegistry()
    for family in (WorkerMetrics, FlowMetrics, GatewayMetrics):
        family(registry)
    folder = tmp_path_factory.mktemp("pages")
    made = manifest(f"storageClasses: [{{name: disk, type: filesystem, path: {folder}}}]")
    PageKeeper(made, None, "kv", "h", registry)
    return {f"{found.name}_total" if found.type == "counter" else found.name for found in registry.collect()}


def named(page: str) -> Iterator[str]:
    """Names of the page; one that begins with ``_`` stands for the last whole one with another end."""
    whole = ""
    for prefix, rest in _NAMED.findall((DOCS / page).read_text()):
        if prefix:
            whole = prefix + "_" + rest.split("_")[1]
            yield prefix + rest
        else:
            yield whole + rest


@pytest.mark.parametrize("page", ["tiers.md", "locality.md"])
def test_documented_metrics_exist(existing: set[str], page: str) -> None:
    found = set(named(page))
    assert len(found) >= 8
    assert found <= existing


def test_all_metrics_of_tiers_are_documented(existing: set[str]) -> None:
    assert {name for name in existing if re.match("llmserve_(tier|storage)_", name)} <= set(named("tiers.md"))
