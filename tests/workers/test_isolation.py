"""Tenants on one worker behind one router: nobody hits another's pages, by whatever it publishes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import msgspec
import pytest
from msgspec.structs import replace
from prometheus_client import CollectorRegistry

from llmserve.bus.block_hashes import short_hashes
from llmserve.bus.cache_salt import CacheSalts, request_salt
from llmserve.bus.flow.router import Router
from llmserve.bus.flow.settings import RouterSettings
from llmserve.bus.memory import MemoryBroker
from llmserve.bus.messages import AnyMessage, Deltas, Finished, Heartbeat, Request, Role
from llmserve.workers.engine.simulated import SimulatedEngine, SimulatedSettings
from llmserve.workers.engine.simulated_sequence import Limits
from llmserve.workers.metrics import WorkerMetrics
from llmserve.workers.reports import Identity
from llmserve.workers.worker import Worker, WorkerSettings
from tests.workers.world import FAST, request, until

PAGE = 16
PROMPT = list(range(1, 100))
SALTS = CacheSalts("test", {"friends": ["ann", "bob"]})


class Deployment:
    """A router, one worker of both roles, and whoever publishes straight onto the bus."""

    def __init__(self) -> None:
        self.broker = MemoryBroker()
        self.bus = self.broker.bus("test")
        self.router = Router(self.broker.bus("r"), RouterSettings(), "r", rng=random.Random(1))
        limits = Limits(slots=8, step_tokens=64, pages=200, page_tokens=PAGE, max_model_len=1024, prefix_cache=True)
        self.worker = Worker(
            self.broker.bus("w"),
            SimulatedEngine(SimulatedSettings(limits, FAST)),
            Identity("w", Role.BOTH, host="h"),
            WorkerSettings(salts=SALTS),
            WorkerMetrics(CollectorRegistry()).of("w", Role.BOTH),
        )
        self.cached: dict[str, int | None] = {}
        self.finished: dict[str, Finished] = {}
        self.tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        await self.bus.subscribe(self.bus.subjects.gateway("g1"), self._hear)
        await self.bus.subscribe(self.bus.subjects.events, self._hear)
        self.bus.publish(self.bus.subjects.heartbeats, Heartbeat(member="g1", role=Role.GATEWAY, host="h", pid=1))
        await self.worker.start()
        self.tasks.append(asyncio.create_task(self.worker.run()))
        await self.router.start()
        self.tasks.append(asyncio.create_task(self.router.run()))

    def _hear(self, message: AnyMessage) -> None:
        if isinstance(message, Deltas):
            for delta in message.items:
                self.cached.setdefault(delta.request_id, delta.cached_tokens)
        elif isinstance(message, Finished):
            self.finished[message.request_id] = message

    async def ask(self, tenant: str, made: Request) -> int | None:
        """Publish on the tenant's subject; returns the tokens that were found in the cache."""
        await self.bus.accept(made, tenant, "interactive")
        await until(lambda: made.request_id in self.finished)
        assert self.finished[made.request_id].cached_tokens == self.cached[made.request_id]
        return self.cached[made.request_id]

    async def stop(self) -> None:
        await self.router.stop()
        await self.worker.stop()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


@pytest.fixture
async def deployment() -> AsyncIterator[Deployment]:
    made = Deployment()
    await made.start()
    yield made
    await made.stop()


def salted(name: str, salt: str | None, *, pages_of: str = "") -> Request:
    """A request whose body names ``salt``, and which claims the pages that ``pages_of`` has for it."""
    sampling = {"max_tokens": 2}
    body = msgspec.msgpack.encode(["r", PROMPT, None, sampling, None, 0.0, None, salt])
    made = request(name, PROMPT, max_tokens=2, body=body)
    if not pages_of:
        return made
    hashes = short_hashes(PROMPT, PAGE, SALTS.worker_salt(pages_of, salt))
    return replace(made, block_tokens=PAGE, block_hashes=hashes)


OWN = request_salt(SALTS.owner("ann"), None)
CACHED = 96


async def test_a_tenant_finds_its_own_pages_and_those_of_its_group(deployment: Deployment) -> None:
    assert await deployment.ask("ann", salted("a1", OWN)) == 0
    assert await deployment.ask("ann", salted("a2", OWN)) == CACHED
    assert await deployment.ask("bob", salted("b1", OWN)) == CACHED


@pytest.mark.parametrize(
    "salt",
    [None, OWN, SALTS.owner("ann").hex(), SALTS.worker_salt("ann", OWN), ""],
    ids=["none", "the same", "the owner's", "the pages' own", "empty"],
)
async def test_no_guess_of_a_salt_and_no_claim_of_blocks_finds_anothers_pages(
    deployment: Deployment, salt: str | None
) -> None:
    assert await deployment.ask("ann", salted("a1", OWN)) == 0
    await until(lambda: len(deployment.router.core.locality.index) > 0)
    assert await deployment.ask("eve", salted("e1", salt)) == 0
    # It claims the very hashes of the victim's pages, which the router knows to be on the worker.
    assert await deployment.ask("eve", salted("e2", f"{salt}!", pages_of="ann")) == 0
    claimed = replace(
        salted("e3", f"{salt}?"), block_tokens=PAGE, block_hashes=salted("x", OWN, pages_of="ann").block_hashes
    )
    assert await deployment.ask("eve", claimed) == 0
    assert await deployment.ask("ann", salted("a2", OWN)) == CACHED


async def test_a_claim_of_anothers_blocks_does_not_lower_what_a_tenant_pays(deployment: Deployment) -> None:
    await deployment.ask("ann", salted("a1", OWN))
    await until(lambda: len(deployment.router.core.locality.index) > 0)
    claimed = replace(
        salted("e1", None), block_tokens=PAGE, block_hashes=salted("x", OWN, pages_of="ann").block_hashes
    )
    await deployment.ask("eve", claimed)
    end = deployment.finished["e1"]
    # The estimate believed the claim; the account is settled by what the engine computed.
    assert (end.prompt_tokens, end.cached_tokens) == (len(PROMPT), 0)
