"""Real stacks, each started once for all tests that share it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.made_up import made_up
from tests.processes import Stack, manifest_with, running
from tests.services import Services

SMALL = {"engine.kv_space_gb": 0.5}
LEASE_S = 10.0
"""Of ``services``."""
EXACT = {**SMALL, "kv_cache.prefix_caching": False}
"""Without prefix caching, so that every page is computed once and moved once; in fp32, whose greedy output does not
depend on which requests share a batch."""


def tiers(folder: Path) -> dict[str, object]:
    """Changes to a manifest: pages outlive their engines in ``folder``."""
    return {
        "storageClasses": [{"name": "disk", "type": "filesystem", "path": str(folder)}],
        "kv_cache.disk_dtype": "zstd",
        "kv_cache.dram_gb": 0.25,
    }


@pytest.fixture(scope="session")
def pd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """manifests/local.yaml: one prefill and one decode worker on the CPU; with a parser of tool calls."""
    folder = tmp_path_factory.mktemp("pd")
    changes = {**SMALL, **tiers(folder / "pages"), "gateway.tool_call_parser": "hermes"}
    stack = Stack(manifest_with("local.yaml", folder, changes), folder / "up.log")
    with running(stack):
        yield stack.ready()


@pytest.fixture(scope="session")
def client(pd: Stack) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{pd.url}/v1", api_key="none", timeout=120, max_retries=0)


@pytest.fixture(scope="package")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """``pd`` with the made-up model, as ``EXACT`` has it, without a parser."""
    folder = tmp_path_factory.mktemp("exact")
    stack = Stack(manifest_with("local.yaml", folder, {**EXACT, **made_up()}), folder / "up.log")
    with running(stack):
        yield stack.ready()


@pytest.fixture(scope="package")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    """The services of docker-compose.yml, in fp32 for the reason that ``exact`` has."""
    changes = {"transfer.lease_s": LEASE_S, "transfer.same_host": False}
    folder = tmp_path_factory.mktemp("services")
    services = Services(folder, changes={**SMALL, **tiers(folder / "pages"), **made_up(), **changes})
    try:
        services.start_all(["gateway", "router", "prefill", "decode", "kv"])
        services.ready()
        yield services
    finally:
        services.end()
