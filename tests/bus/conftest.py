"""A real server, and the two kinds of bus under one name."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from llmserve.bus.memory import MemoryBroker, MemoryBus
from llmserve.bus.nats import NatsBus, connect
from llmserve.bus.server import EmbeddedServer
from llmserve.bus.settings import BusSettings

AnyBus = MemoryBus | NatsBus
Join = Callable[[str], Awaitable[AnyBus]]
JoinNats = Callable[..., Awaitable[NatsBus]]

SETTINGS = BusSettings(queue_max_len=3)
_deployments = itertools.count()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    """A server of the test's own, to be killed."""
    server = EmbeddedServer(tmp_path / "state")
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """A server for tests that leave it alone."""
    server = EmbeddedServer(tmp_path_factory.mktemp("nats"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
async def join_nats(server: EmbeddedServer) -> AsyncIterator[JoinNats]:
    """Connects members to ``server``."""
    joined: list[NatsBus] = []

    async def join(member: str, settings: BusSettings | None = None) -> NatsBus:
        joined.append(await connect(server.url, server.token, "test", member=member, settings=settings))
        return joined[-1]

    yield join
    for bus in joined:
        await bus.close()


@pytest.fixture(params=["memory", "nats"])
async def join(request: pytest.FixtureRequest) -> AsyncIterator[Join]:
    """Connects members of a fresh deployment whose queues hold three requests."""
    deployment = f"d{next(_deployments)}"
    joined: list[AnyBus] = []
    if request.param == "memory":
        broker = MemoryBroker(deployment, SETTINGS)

        async def join(member: str) -> AnyBus:
            joined.append(broker.bus(member))
            return joined[-1]
    else:
        server: EmbeddedServer = request.getfixturevalue("shared_server")

        async def join(member: str) -> AnyBus:
            joined.append(await connect(server.url, server.token, deployment, member=member, settings=SETTINGS))
            return joined[-1]

    yield join
    for bus in joined:
        await bus.close()
