"""A request's body on its way in: how large it may be, and how long it may take."""

from __future__ import annotations

import asyncio
from http import HTTPStatus

from starlette.types import Message, Receive

from llmserve.gateway.caller import Caller, Failure


class BodyRefused(Exception):
    """The body grew beyond the limit while it was read, or took too long."""


class RequestBody:
    """The request's body on its way in, counted."""

    def __init__(self, receive: Receive, max_bytes: int, timeout_s: float | None, caller: Caller) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._complete = False
        self._caller = caller
        self._read_bytes = 0
        self._began_s = asyncio.get_running_loop().time()

    async def receive(self) -> Message:
        # Behind its body a request is read for its end only, for as long as it is answered.
        message = await self._receive() if self._complete else await self._receive_in_time()
        if message["type"] == "http.request":
            self._complete = not message.get("more_body")
            self._read_bytes += len(message.get("body", b""))
            self.check(self._read_bytes)
        elif message["type"] == "http.disconnect":
            self._caller.disconnected = True
        return message

    async def _receive_in_time(self) -> Message:
        deadline_s = None if self._timeout_s is None else self._began_s + self._timeout_s
        try:
            async with asyncio.timeout_at(deadline_s):
                return await self._receive()
        except TimeoutError:
            text = f"The body did not arrive within {self._timeout_s:g} s"
            self._caller.failure = Failure(HTTPStatus.REQUEST_TIMEOUT, "RequestTimeoutError", text)
            raise BodyRefused from None

    def check(self, size_bytes: int) -> None:
        """Raise ``BodyRefused`` and note the failure: FastAPI makes a 400 of whatever a body raises."""
        if size_bytes > self._max_bytes:
            text = f"The body is larger than {self._max_bytes} bytes"
            self._caller.failure = Failure(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "RequestTooLargeError", text)
            raise BodyRefused
