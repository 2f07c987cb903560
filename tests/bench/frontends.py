"""Two servers to compare the gateway with, each started as ``python -m tests.bench.frontends KIND PORT MANIFEST``.

``vllm``: vLLM's own OpenAI server on the simulated engine in the same process: no bus, no router.
``floor``: a bare ASGI app on the same HTTP server that streams as many chunks of the same size, and nothing else.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import uvicorn

Scope = MutableMapping[str, Any]
CHUNK = (
    b'data: {"id":"cmpl-0123456789abcdef","object":"text_completion","created":1700000000,"model":"smollm2-135m",'
    b'"choices":[{"index":0,"text":" word","logprobs":null,"finish_reason":%s,"stop_reason":null}],"usage":null}\n\n'
)


async def floor(
    scope: Scope, receive: Callable[[], Awaitable[Scope]], send: Callable[[Scope], Awaitable[None]]
) -> None:
    """The bare app: ``max_tokens`` chunks at the pace of the simulated engine's steps."""
    if scope["type"] != "http":
        return
    body = b""
    while (message := await receive())["type"] == "http.request":
        body += message["body"]
        if not message.get("more_body"):
            break
    count = int(json.loads(body)["max_tokens"])
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    for index in range(count):
        await asyncio.sleep(0.005)
        last = index == count - 1
        await send(
            {"type": "http.response.body", "body": CHUNK % (b'"length"' if last else b"null"), "more_body": True}
        )
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


def main() -> None:
    kind, port, manifest = sys.argv[1:]
    if kind == "floor":
        uvicorn.run(floor, host="127.0.0.1", port=int(port), log_level="warning", access_log=False)
        return
    from tests.bench.direct import serve

    asyncio.run(serve(int(port), manifest))


if __name__ == "__main__":
    main()
