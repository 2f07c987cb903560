"""Messages for tests, and waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from llmserve.bus.messages import Cancel, Heartbeat, Reason, Request, Result, Role
from llmserve.bus.server import EmbeddedServer


def a_request(request_id: str = "r", attempt: int = 0, body: bytes = b"body") -> Request:
    return Request(
        request_id=request_id,
        gateway="g",
        attempt=attempt,
        created_s=1.0,
        prompt_tokens=3,
        max_tokens=4,
        api="test",
        body=body,
    )


def a_result(request_id: str = "r", attempt: int = 0, worker: str = "w") -> Result:
    return Result(
        request_id=request_id, attempt=attempt, worker=worker, reason=Reason.STOP, prompt_tokens=3, output_tokens=4
    )


def a_cancel(name: object) -> Cancel:
    return Cancel(request_ids=[str(name)])


def a_beat(member: str = "m", *, leaving: bool = False, slots: int = 0) -> Heartbeat:
    return Heartbeat(member=member, role=Role.DECODE, host="h", pid=1, leaving=leaving, slots=slots)


async def until(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Wait for the condition, fail after ``timeout_s``."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


def login(server: EmbeddedServer) -> dict[str, str]:
    """How a client that is none of ours joins."""
    user, _, password = server.token.partition(":")
    return {"user": user, "password": password}
