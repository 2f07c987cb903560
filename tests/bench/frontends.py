"""Two servers to compare the gateway with, each started as ``python -m tests.bench.frontends KIND PORT MANIFEST``.

``vllm``: vLLM's own OpenAI server on the simulated engine: no bus, no router.
``floor``: a bare ASGI app on the same HTTP server that streams as many chunks of the same size, and nothing else. Its
streams tick together, as those of one engine do.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import uvicorn
import uvloop

from llmserve.manifests.loader import load
from llmserve.manifests.schema import Simulated

Scope = MutableMapping[str, Any]
CHUNK = (
    b'data: {"id":"chatcmpl-0123456789abcdef0123456789abcdef","object":"chat.completion.chunk","created":1700000000,'
    b'"model":"smollm2-135m","choices":[{"index":0,"delta":{"content":" word"},"logprobs":null,'
    b'"finish_reason":%s,"token_ids":null}]}\n\n'
)


class Ticks:
    """One event for each step of the engine, for all who wait for it."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._next: asyncio.Event | None = None

    async def next(self) -> None:
        if self._next is None:
            self._next = asyncio.Event()
            asyncio.get_running_loop().call_later(self._step_s, self._tick)
        await self._next.wait()

    def _tick(self) -> None:
        event, self._next = self._next, None
        if event is not None:
            event.set()


class Floor:
    """The bare app: ``max_tokens`` chunks at the pace of the simulated engine's steps."""

    def __init__(self, step_s: float) -> None:
        self._ticks = Ticks(step_s)

    async def __call__(
        self, scope: Scope, receive: Callable[[], Awaitable[Scope]], send: Callable[[Scope], Awaitable[None]]
    ) -> None:
        if scope["type"] != "http":
            return
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message.get("more_body"):
                break
        count = int(json.loads(body)["max_tokens"])
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for index in range(count):
            await self._ticks.next()
            last = b'"length"' if index == count - 1 else b"null"
            await send({"type": "http.response.body", "body": CHUNK % last, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


def main() -> None:
    kind, port, manifest = sys.argv[1:]
    if kind == "floor":
        step_s = (load(Path(manifest)).spec.engine.simulated or Simulated()).step_ms / 1000
        uvicorn.run(Floor(step_s), host="127.0.0.1", port=int(port), log_level="warning", access_log=False)
        return
    from tests.bench.direct import serve

    uvloop.run(serve(int(port), manifest))


if __name__ == "__main__":
    main()
