"""One response on its way: held back until it is certain, and replaced by an error if one comes first."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from http import HTTPStatus

from starlette.types import Message, Send

from llmserve.gateway.caller import Caller, Failure
from llmserve.gateway.errors import error_body

_CHALLENGE = (b"www-authenticate", b"Bearer")


@dataclass(slots=True)
class Exchange:
    """One response on its way out.

    vLLM starts a streamed response before it hands the request to the engine. Here nothing leaves before the bus has
    taken the request, so that a refusal has its own status and is no event in a stream with status 200.
    """

    _send: Send
    request_id: str
    caller: Caller | None = None
    status: int = 0
    complete: bool = False
    _held: list[Message] = field(default_factory=list)
    _begun: bool = False
    _replaced: bool = False
    _streaming: bool = False

    async def send(self, message: Message) -> None:
        if self._replaced:
            return
        if self._begun:
            await self._forward(message)
            return
        if self.caller is not None and self.caller.failure is not None:
            await self.fail(self.caller.failure)
            return
        self._held.append(message)
        ended = message["type"] == "http.response.body" and not message.get("more_body")
        if ended or (self.caller is not None and self.caller.accepted):
            await self._release()

    async def finish(self) -> None:
        """The application has returned or broken off."""
        if self.complete or self._replaced:
            return
        failure = self.caller.failure if self.caller is not None else None
        if not self._begun:
            if failure is not None:
                await self.fail(failure)
            elif self._held:
                await self._release()
        elif failure is not None and self._streaming:
            event = b"event: error\ndata: " + error_body(failure.status, failure.kind, failure.message) + b"\n\n"
            await self._forward({"type": "http.response.body", "body": event, "more_body": False})

    async def refuse(self, status: int, kind: str, message: str, headers: list[tuple[bytes, bytes]]) -> None:
        """Answer with an error of ours, unless the response has begun."""
        if self._begun or self._replaced:
            return
        self._replaced = self.complete = True
        self.status = status
        body = error_body(status, kind, message)
        all_headers = [(b"content-type", b"application/json"), (b"x-request-id", self.request_id.encode()), *headers]
        all_headers += self._limit_headers()
        await self._send(response_start(status, all_headers, len(body)))
        await self._send({"type": "http.response.body", "body": body})

    async def fail(self, failure: Failure) -> None:
        """Answer with ``failure``, unless the response has begun."""
        headers = [_CHALLENGE] if failure.status == HTTPStatus.UNAUTHORIZED else []
        if failure.retry_after_s is not None:
            headers.append((b"retry-after", str(failure.retry_after_s).encode()))
        await self.refuse(failure.status, failure.kind, failure.message, headers)

    def _limit_headers(self) -> list[tuple[bytes, bytes]]:
        limiter = self.caller.limiter if self.caller is not None else None
        return limiter.headers(time.monotonic()) if limiter is not None else []

    async def _release(self) -> None:
        self._begun = True
        for message in self._held:
            await self._forward(message)
        self._held.clear()

    async def _forward(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._streaming = any(value.startswith(b"text/event-stream") for _, value in message["headers"])
            headers = [(name, value) for name, value in message["headers"] if name.lower() != b"x-request-id"]
            headers += [(b"x-request-id", self.request_id.encode()), *self._limit_headers()]
            message = {**message, "headers": headers}
        elif message["type"] == "http.response.body" and not message.get("more_body"):
            self.complete = True
        await self._send(message)


def response_start(status: int, headers: list[tuple[bytes, bytes]], body_bytes: int) -> Message:
    """The start of a response with a body of ``body_bytes``."""
    headers = [*headers, (b"content-length", str(body_bytes).encode())]
    return {"type": "http.response.start", "status": status, "headers": headers}
