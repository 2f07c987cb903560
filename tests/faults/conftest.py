"""One deployment of separate processes, on simulated engines, for all tests of this folder."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.faults.observer import Observer
from tests.services import Services
from tests.sim_gateway import SimGateway

LEASE_S = 5.0
ROLES = ["gateway", "router", "prefill", "decode"]


@pytest.fixture(scope="session")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    changes = {"transfer.lease_s": LEASE_S, "transfer.timeout_s": 2.0, "engine.max_num_seqs": 16}
    services = Services(tmp_path_factory.mktemp("faults"), "sim.yaml", changes)
    try:
        services.start_all(ROLES)
        for role in ("router", "prefill", "decode"):
            services.start(f"{role}-2", role)
        services.ready()
        yield services
    finally:
        services.end()


@pytest.fixture
async def observer(services: Services) -> AsyncIterator[Observer]:
    observer = await Observer.open(services)
    yield observer
    await observer.close()


@pytest.fixture
async def gateway(observer: Observer) -> AsyncIterator[SimGateway]:
    """A gateway in this process; it and its requests outlive every process that a test kills."""
    gateway = SimGateway(observer.bus)
    await gateway.open()
    yield gateway
    await gateway.close()
