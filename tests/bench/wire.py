"""A load generator that costs little itself: raw HTTP/1.1 on asyncio protocols, one connection a stream.

It looks for the end of each answer and keeps the times at which bytes came; it parses nothing else.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

_END = b"\r\n0\r\n\r\n"
_EVENT = b"data: {"


@dataclass
class Answer:
    """What came back. ``times_s`` are of the reads: one for each token if the server does not fall behind."""

    began_s: float
    status: int = 0
    events: int = 0
    times_s: list[float] = field(default_factory=list)
    done: bool = False
    """The stream ended with ``[DONE]``."""


class Wire(asyncio.Protocol):
    """One kept-alive connection."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._answer: Answer | None = None
        self._ended: asyncio.Future[Answer] | None = None
        self._tail = b""
        self.begun = asyncio.Event()
        """Set with the first token of the running answer."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclass of asyncio's.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        answer = self._answer
        if answer is None:
            return
        if not answer.status:
            answer.status = int(data[9:12])
        events = data.count(_EVENT)
        if events:
            answer.events += events
            answer.times_s.append(time.perf_counter())
            if answer.events > 1:
                self.begun.set()
        if b"data: [DONE]" in data:
            answer.done = True
        self._tail = (self._tail + data)[-len(_END) :]
        if self._tail == _END or (answer.status != 200 and not answer.events):
            self._finish()

    def connection_lost(self, exc: Exception | None) -> None:
        self._finish()

    @property
    def running(self) -> Answer:
        """The answer on its way."""
        assert self._answer is not None
        return self._answer

    async def ask(self, request: bytes) -> Answer:
        """Send a request and wait for the whole answer."""
        assert self._transport is not None
        self.begun.clear()
        self._tail = b""
        self._answer = Answer(time.perf_counter())
        self._ended = asyncio.get_running_loop().create_future()
        if self._transport.is_closing():
            self._finish()
        else:
            self._transport.write(request)
        return await self._ended

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def _finish(self) -> None:
        if self._ended is not None and not self._ended.done() and self._answer is not None:
            self._ended.set_result(self._answer)
        self._answer = None


async def connect(url: str, count: int) -> list[Wire]:
    """``count`` connections to the server."""
    parts = urlsplit(url)
    loop = asyncio.get_running_loop()
    host, port = parts.hostname or "127.0.0.1", parts.port or 80
    made = [await loop.create_connection(Wire, host, port) for _ in range(count)]
    return [wire for _, wire in made]


def chat_request(url: str, model: str, text: str, output_tokens: int) -> bytes:
    """The bytes of a streamed chat completion of exactly ``output_tokens``."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": output_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: {urlsplit(url).netloc}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of ``values`` lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]
