"""The way of a request with nothing decided on it: nats-py, a stream on file, and a process that passes messages on.

The hops are those of a dispatch: publish to the stream, an ordered consumer in another process, publish to a subject
that the first process hears. ``floor`` is what the real way is held against: both cross the same server, in one run.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import random
import time

import nats
import uvloop
from nats.aio.msg import Msg

from llmserve.bus.server import EmbeddedServer
from tests.bus.samples import login

STREAM, REQUESTS, WORK = "FLOOR", "floor.req.*", "floor.work"
READY = "floor.ready"
BODY_BYTES = 400
"""As large as a request of the dispatch figure."""


async def pass_on(url: str, user: dict[str, str]) -> None:
    client = await nats.connect(url, **user)

    async def receive(message: Msg) -> None:
        await client.publish(WORK, message.data)

    await client.jetstream().subscribe(REQUESTS, stream=STREAM, ordered_consumer=True, cb=receive)
    await client.flush()
    await client.publish(READY)
    await asyncio.Event().wait()


def passing_process(url: str, user: dict[str, str]) -> None:
    uvloop.run(pass_on(url, user))


async def floor(server: EmbeddedServer, rate: float, seconds: float) -> list[float]:
    """Seconds of each message's way, all but those of the first second."""
    client = await nats.connect(server.url, **login(server))
    stream = client.jetstream()
    await stream.add_stream(name=STREAM, subjects=[REQUESTS])
    ready, sent_s, took_s = asyncio.Event(), list[float](), dict[int, float]()

    async def receive(message: Msg) -> None:
        number = int.from_bytes(message.data[:4], "big")
        took_s[number] = time.monotonic() - sent_s[number]

    async def passes(_: Msg) -> None:
        ready.set()

    await client.subscribe(WORK, cb=receive)
    await client.subscribe(READY, cb=passes)
    await client.flush()
    process = multiprocessing.get_context("spawn").Process(
        target=passing_process, args=(server.url, login(server)), daemon=True
    )
    process.start()
    try:
        async with asyncio.timeout(30):
            await ready.wait()
        rng, publishing, begun_s = random.Random(3), set[asyncio.Task[object]](), time.monotonic()
        for number in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, begun_s + number / rate - time.monotonic()))
            body = number.to_bytes(4, "big") + bytes(BODY_BYTES - 4)
            headers = {"Nats-Msg-Id": f"{number}.{rng.getrandbits(64):x}"}
            sent_s.append(time.monotonic())
            task = asyncio.create_task(stream.publish(f"floor.req.{rng.choice('abcd')}", body, headers=headers))
            publishing.add(task)
            task.add_done_callback(publishing.discard)
        async with asyncio.timeout(30):
            while len(took_s) < len(sent_s):
                await asyncio.sleep(0.05)
    finally:
        process.kill()
        process.join()
        await stream.delete_stream(STREAM)
        await client.close()
    return [took_s[number] for number in itertools.takewhile(took_s.__contains__, itertools.count(int(rate)))]
