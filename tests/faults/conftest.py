"""One deployment of separate processes for all tests of this folder.

On simulated engines, unless ``LLMSERVE_CHAOS_ENGINE=vllm``, which is for ``test_chaos.py``.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator

import pytest

from llmserve.gateway.gateway import engine_api
from tests.faults.observer import Observer
from tests.services import Services
from tests.sim_gateway import SimGateway
from tests.vllm_request import codec

LEASE_S = 5.0
ON_VLLM = os.environ.get("LLMSERVE_CHAOS_ENGINE", "simulated") == "vllm"
ROLES = ["gateway", "router", "prefill", "decode"]
WORKERS = ["prefill", "prefill-2", "decode", "decode-2"]


@pytest.fixture(scope="session")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    changes: dict[str, object] = {"transfer.lease_s": LEASE_S, "transfer.timeout_s": 2.0, "engine.max_num_seqs": 16}
    if ON_VLLM:
        # In fp32, whose greedy output does not depend on which requests share a batch.
        changes |= {"engine.kv_space_gb": 0.25, "models.primary.dtype": "fp32"}
    source = "compose.yaml" if ON_VLLM else "sim.yaml"
    services = Services(tmp_path_factory.mktemp("faults"), source, changes)
    try:
        services.start_all(ROLES)
        for role in ("router", "prefill", "decode"):
            services.start(f"{role}-2", role)
        services.ready()
        all_joined(services, 60)
        yield services
    finally:
        services.end()


def all_joined(services: Services, timeout_s: float) -> None:
    """Wait until every worker serves."""
    for name in WORKERS:
        services.processes[name].wait_for_line("ready after", timeout_s)


@pytest.fixture
async def observer(services: Services) -> AsyncIterator[Observer]:
    observer = await Observer.open(services)
    yield observer
    await observer.close()


@pytest.fixture
async def gateway(observer: Observer) -> AsyncIterator[SimGateway]:
    """A gateway in this process; it and its requests outlive every process that a test kills."""
    gateway = SimGateway(observer.bus, engine_api(), codec) if ON_VLLM else SimGateway(observer.bus)
    await gateway.open()
    yield gateway
    await gateway.close()
