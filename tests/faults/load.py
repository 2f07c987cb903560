"""Requests for the tests of this folder, and what their answers must be."""

from __future__ import annotations

import asyncio

import aiohttp

from tests.bench.load import Stream, stream
from tests.faults.observer import Observer
from tests.services import Services
from tests.sim_gateway import Answer, SimGateway
from tests.workers.world import expected


def prompt(number: int, tokens: int = 60) -> list[int]:
    """A prompt that no other number has."""
    return [1000 + (number * 104729 + k * 31) % 40000 for k in range(tokens)]


async def asked(gateway: SimGateway, count: int, tokens: int, *, over_s: float = 0.0) -> list[Answer]:
    """Answers of requests that come evenly within ``over_s``; returns when all are over."""

    async def one(number: int) -> Answer:
        await asyncio.sleep(over_s * number / count)
        return await gateway.ask(prompt(number), tokens)

    return await asyncio.gather(*(one(number) for number in range(count)))


async def answers(services: Services, bodies: list[dict[str, object]], over_s: float = 0.0) -> list[Stream]:
    """Streams that start evenly within ``over_s``."""
    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(headers=services.headers, timeout=timeout) as session:

        async def one(index: int) -> Stream:
            await asyncio.sleep(over_s * index / len(bodies))
            return await stream(session, services.url, bodies[index])

        return await asyncio.gather(*(one(index) for index in range(len(bodies))))


def require_exact(answers: list[Answer]) -> None:
    """Every answer ended well, with exactly the tokens that an undisturbed run yields."""
    assert not [answer.error for answer in answers if answer.error]
    for answer in answers:
        assert answer.tokens == expected(answer.prompt, answer.max_tokens)


async def require_once(observer: Observer, gateways: set[str]) -> None:
    """Every request of these gateways that stood on the stream was completed, and nothing was completed twice.

    A record follows the last token: a client may know the end before it is written.
    """
    wanted = {item.request.request_id for item in observer.seen.values() if item.request.gateway in gateways}
    async with asyncio.timeout(5):
        while not wanted <= (await observer.results())[0].keys():
            await asyncio.sleep(0.05)
    results, recorded = await observer.results()
    assert recorded == len(results)
