"""A load generator for OpenAI-compatible servers: streams completions and keeps the times that matter."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from dataclasses import dataclass, field
from statistics import median

import aiohttp


@dataclass(frozen=True)
class Stream:
    """One streamed answer, as its client saw it."""

    ttft_s: float
    seconds: float
    chunks: int
    text: str
    finish_reason: str | None
    error: str = ""
    longest_pause_s: float = 0.0
    """Between two events, the first token and the end among them."""
    output_tokens: int = 0
    """As the server counts them, if it was asked to."""


@dataclass
class Load:
    """All answers of one measurement."""

    seconds: float
    streams: list[Stream] = field(default_factory=list)

    @property
    def good(self) -> list[Stream]:
        return [s for s in self.streams if not s.error]

    @property
    def errors(self) -> list[str]:
        return [s.error for s in self.streams if s.error]

    @property
    def requests_per_s(self) -> float:
        return len(self.good) / self.seconds

    @property
    def tokens_per_s(self) -> float:
        return sum(s.chunks for s in self.good) / self.seconds

    @property
    def ttft_p50_s(self) -> float:
        return median(s.ttft_s for s in self.good)


async def stream(session: aiohttp.ClientSession, url: str, body: dict[str, object]) -> Stream:
    """One streamed completion; a failure is a ``Stream`` with ``error`` set."""
    start = last = time.perf_counter()
    ttft_s, pause_s, chunks, output_tokens, finish = 0.0, 0.0, 0, 0, None
    text: list[str] = []

    def ended(error: str = "") -> Stream:
        now = time.perf_counter()
        pause = max(pause_s, now - last) if chunks else 0.0
        return Stream(
            ttft_s, now - start, chunks, "".join(text), None if error else finish, error, pause, output_tokens
        )

    try:
        async with session.post(f"{url}/v1/completions", json={**body, "stream": True}) as response:
            if response.status != 200:
                return ended(f"{response.status} {await response.text()}")
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    return ended(str(event["error"]))
                now = time.perf_counter()
                if not event["choices"]:
                    output_tokens = event["usage"]["completion_tokens"]
                    continue
                choice = event["choices"][0]
                if chunks:
                    pause_s = max(pause_s, now - last)
                else:
                    ttft_s = now - start
                last = now
                chunks += 1
                text.append(choice["text"] if "text" in choice else choice["delta"].get("content") or "")
                finish = choice["finish_reason"] or finish
    except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
        return ended(repr(error))
    return ended("" if finish else "the stream ended without a finish reason")


async def closed_loop(
    url: str,
    bodies: list[dict[str, object]],
    concurrency: int,
    *,
    for_s: float | None = None,
    headers: dict[str, str] | None = None,
) -> Load:
    """``concurrency`` clients that each ask again as soon as they are answered.

    Each body is sent once, or, with ``for_s``, all of them over and over for that many seconds.
    """
    source = itertools.cycle(bodies) if for_s else iter(bodies)
    end = time.perf_counter() + for_s if for_s else float("inf")
    streams: list[Stream] = []

    async def client(session: aiohttp.ClientSession) -> None:
        while time.perf_counter() < end and (body := next(source, None)) is not None:
            streams.append(await stream(session, url, body))

    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:
        start = time.perf_counter()
        await asyncio.gather(*(client(session) for _ in range(concurrency)))
        return Load(time.perf_counter() - start, streams)


def prompt_bodies(
    model: str, count: int, prompt_tokens: int, output_tokens: int, seed: int = 0
) -> list[dict[str, object]]:
    """Completions with prompts of ids that no two requests share from the first one on, so that no cache helps."""
    return [
        {
            "model": model,
            "prompt": [1000 + (seed * 7919 + i * 104729 + k * 31) % 40000 for k in range(prompt_tokens)],
            "max_tokens": output_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        for i in range(count)
    ]
