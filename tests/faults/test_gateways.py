"""Gateways are killed: what they served is cleaned up, and the batch work that they ran is done by others, or by
their successor, each request once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator

import openai
import pytest

from llmserve.bus.keyvalue import KeyValue
from llmserve.bus.publisher import Publisher
from llmserve.gateway.batch_store import lease_key
from tests.bench.load import prompt_bodies
from tests.faults.load import answers, asked, prompt, require_exact
from tests.faults.observer import Observer
from tests.processes import answers as answers_200
from tests.processes import wait_for
from tests.services import Services
from tests.sim_gateway import SimGateway
from tests.workers.world import expected

pytestmark = pytest.mark.faults

LINES = 60
PUBLISHED = 30


@pytest.fixture(scope="module")
def other(services: Services) -> Iterator[str]:
    """URL of a second gateway's API."""
    process = services.start("gateway-2", "gateway")
    wait_for(lambda: answers_200(f"{services.urls['gateway-2']}/health/ready"), 180, "the second gateway")
    yield services.urls["gateway-2"]
    process.end()
    del services.processes["gateway-2"]


@pytest.fixture
async def publisher(services: Services) -> AsyncIterator[Publisher]:
    url = services.nats_url.replace("secret@", "")
    async with Publisher(url, "sim", "default", credentials="secret") as publisher:
        yield publisher


class Batches:
    """Batches of one tenant, through whichever gateway lives."""

    def __init__(self, services: Services, observer: Observer, url: str) -> None:
        self.model = services.model
        self.client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=services.key, max_retries=0)
        bus = observer.bus
        self._leases = KeyValue(bus.jetstream, bus.subjects.batch_bucket)

    def body(self, number: int, tokens: int) -> dict[str, object]:
        return {
            "model": self.model,
            "prompt": prompt(number),
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }

    async def begin(self, tokens: int) -> str:
        """A batch of ``LINES`` requests; its id."""
        lines = [
            {"custom_id": f"line {k}", "method": "POST", "url": "/v1/completions", "body": self.body(k, tokens)}
            for k in range(LINES)
        ]
        data = "\n".join(json.dumps(line) for line in lines).encode()
        file = await self.client.files.create(file=("lines.jsonl", data), purpose="batch")
        batch = await self.client.batches.create(
            input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
        )
        return batch.id

    async def holder(self, batch_id: str) -> str:
        """Member id of the gateway that runs it."""
        async with asyncio.timeout(10):
            while True:
                lease = await self._leases.get(lease_key("default", batch_id))
                if lease is not None and lease.value:
                    return lease.value.decode().split()[0]
                await asyncio.sleep(0.05)

    async def done(self, batch_id: str) -> int:
        batch = await self.client.batches.retrieve(batch_id)
        assert batch.request_counts is not None
        assert batch.request_counts.failed == 0
        return batch.request_counts.completed

    async def require_exact(self, batch_id: str, tokens: int) -> None:
        """Wait for its end: every line is there once, with exactly its tokens."""
        async with asyncio.timeout(60):
            while (batch := await self.client.batches.retrieve(batch_id)).status != "completed":
                assert batch.status in ("in_progress", "finalizing"), batch
                await asyncio.sleep(0.1)
        assert batch.output_file_id is not None
        assert batch.error_file_id is None
        output = await self.client.files.content(batch.output_file_id)
        rows = [json.loads(line) for line in output.text.splitlines()]
        assert [row["custom_id"] for row in rows] == [f"line {k}" for k in range(LINES)]
        for number, row in enumerate(rows):
            check(row["response"], number, tokens)


def check(response: object, number: int, tokens: int) -> None:
    assert isinstance(response, dict)
    assert response["status_code"] == 200, response
    assert response["body"]["choices"][0]["token_ids"] == expected(prompt(number), tokens)


async def require_published(publisher: Publisher, ids: list[str], tokens: int) -> None:
    for number, message_id in enumerate(ids):
        result = await publisher.result(message_id, timeout_s=60)
        check(result["response"], number, tokens)


async def publish(publisher: Publisher, batches: Batches, tokens: int) -> list[str]:
    return [
        await publisher.submit(batches.body(number, tokens), url="/v1/completions") for number in range(PUBLISHED)
    ]


async def test_what_a_killed_gateway_left_is_gone_within_two_seconds_and_its_batch_goes_on_elsewhere(
    services: Services, observer: Observer, gateway: SimGateway, publisher: Publisher, other: str
) -> None:
    member = await observer.member(services.processes["gateway"])
    batches = Batches(services, observer, services.url)
    batch_id = await batches.begin(50)
    while await batches.holder(batch_id) != member:
        # Whoever hears of a batch first runs it, most often the gateway that was given it.
        await batches.require_exact(batch_id, 50)
        batch_id = await batches.begin(50)
    published = await publish(publisher, batches, 50)
    dying = asyncio.create_task(answers(services, prompt_bodies(services.model, 60, 100, 1500)))
    others = asyncio.create_task(asked(gateway, 12, 250))
    await asyncio.sleep(1.5)
    assert 0 < observer.left_by(member) < await observer.stored_by(member)  # some run, some are queued
    assert await batches.done(batch_id) < LINES
    services.processes["gateway"].kill()
    async with asyncio.timeout(2):
        while observer.left_by(member) or await observer.stored_by(member):
            await asyncio.sleep(0.02)
    assert all(s.error for s in await dying)
    require_exact(await others)
    elsewhere = Batches(services, observer, other)
    await elsewhere.require_exact(batch_id, 50)
    await require_published(publisher, published, 50)


async def test_the_work_of_the_only_gateway_waits_for_its_successor(
    services: Services, observer: Observer, publisher: Publisher, other: str
) -> None:
    assert services.processes["gateway"].child.poll() is not None
    batches = Batches(services, observer, other)
    batch_id = await batches.begin(120)
    published = await publish(publisher, batches, 120)
    async with asyncio.timeout(30):
        while not await batches.done(batch_id):
            await asyncio.sleep(0.1)
    services.processes["gateway-2"].kill()
    services.start("gateway")
    await asyncio.to_thread(services.processes["gateway"].wait_for_line, "gateway on", 60)
    successor = Batches(services, observer, services.url)
    assert 0 < await successor.done(batch_id) < LINES
    await successor.require_exact(batch_id, 120)
    await require_published(publisher, published, 120)
    await observer.settled(10)
