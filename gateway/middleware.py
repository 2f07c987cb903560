"""What stands between the socket and vLLM's server: identity, limits, request ids, health, errors. Pure ASGI."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmserve.gateway.access import Access, is_upload, no_such_model
from llmserve.gateway.caller import Caller, Failure, current_caller
from llmserve.gateway.errors import error_body
from llmserve.gateway.identity import Denied
from llmserve.gateway.limits import LimitExceeded
from llmserve.gateway.metrics import GatewayMetrics

log = logging.getLogger("llmserve.gateway.access")

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}\Z")
_LIVE, _READY = "/health/live", "/health/ready"


class Health(Protocol):
    def missing(self) -> str:
        """What is missing for serving, or nothing."""


class BodyRefused(Exception):
    """The body grew beyond the limit while it was read, or took too long."""


@dataclass(frozen=True, slots=True)
class RequestBounds:
    """What one request may cost; None is no bound."""

    body_bytes: int
    file_bytes: int
    """Of a body that is an uploaded file."""
    body_timeout_s: float | None = None
    request_timeout_s: float | None = None


class GatewayMiddleware:
    """Wraps vLLM's server."""

    def __init__(
        self, app: ASGIApp, access: Access, health: Health, metrics: GatewayMetrics, bounds: RequestBounds
    ) -> None:
        self._app = app
        self._access = access
        self._health = health
        self._metrics = metrics
        self._bounds = bounds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if scope["path"] in (_LIVE, _READY):
            await self._answer_health(scope["path"], send)
            return
        exchange = Exchange(send, _request_id(headers))
        try:
            tenant = await self._access.identity.tenant_of(headers)
        except Denied as denied:
            await self._refuse(scope, exchange, Caller("unknown", exchange.request_id), denied.failure)
            return
        limiter = self._access.limits.of(tenant)
        caller = Caller(tenant, exchange.request_id, limiter=limiter)
        if not self._access.may_use_model(limiter) and scope["path"].startswith("/v1/models"):
            await self._hide_model(scope, exchange, caller)
            return
        try:
            counted = self._access.enter(limiter, scope["method"], scope["path"])
        except LimitExceeded as exceeded:
            exchange.caller = caller
            await self._refuse(scope, exchange, caller, exceeded.failure)
            return
        try:
            await self._serve(scope, receive, exchange, caller, headers)
        finally:
            if counted and limiter is not None:
                limiter.leave()

    async def _refuse(self, scope: Scope, exchange: Exchange, caller: Caller, failure: Failure) -> None:
        caller.failure = failure
        await exchange.fail(failure)
        self._record(scope, exchange, caller, disconnected=False)

    async def _hide_model(self, scope: Scope, exchange: Exchange, caller: Caller) -> None:
        if scope["path"].rstrip("/") == "/v1/models":
            body = b'{"object":"list","data":[]}'
            await exchange.send(_start(200, [(b"content-type", b"application/json")], len(body)))
            await exchange.send({"type": "http.response.body", "body": body})
            self._record(scope, exchange, caller, disconnected=False)
        else:
            await self._refuse(scope, exchange, caller, no_such_model(scope["path"].removeprefix("/v1/models/")))

    async def _serve(
        self, scope: Scope, receive: Receive, exchange: Exchange, caller: Caller, headers: dict[bytes, bytes]
    ) -> None:
        exchange.caller = caller
        bounds = self._bounds
        max_bytes = bounds.file_bytes if is_upload(scope["path"]) else bounds.body_bytes
        body = _Body(receive, max_bytes, bounds.body_timeout_s, caller)
        token = current_caller.set(caller)
        self._metrics.open_requests.inc()
        try:
            body.check(_declared_bytes(headers))
            async with asyncio.timeout(bounds.request_timeout_s) as deadline:
                await self._app(scope, body.receive, exchange.send)
            await exchange.finish()
        except BodyRefused:
            await exchange.finish()
        except TimeoutError as error:
            if deadline.expired() and caller.failure is None:
                text = f"The response took longer than {bounds.request_timeout_s:g} s"
                caller.failure = Failure(HTTPStatus.GATEWAY_TIMEOUT, "TimeoutError", text)
            elif caller.failure is None:
                log.error("request failed: %r", error)
            await exchange.finish()
        except Exception as error:
            # vLLM's error handler answers, then the error goes on to whoever serves; a stream just breaks off.
            if caller.failure is None:
                log.error("request failed: %r", error)
            await exchange.finish()
        finally:
            self._metrics.open_requests.dec()
            self._record(scope, exchange, caller, disconnected=body.disconnected and not exchange.complete)
            current_caller.reset(token)

    def _record(self, scope: Scope, exchange: Exchange, caller: Caller, *, disconnected: bool) -> None:
        duration_s = time.monotonic() - caller.received_s
        outcome = _outcome(exchange.status, caller, disconnected)
        self._metrics.answered(caller.tenant, outcome, exchange.status, duration_s)
        log.info(
            "%s %s %d",
            scope["method"],
            scope["path"],
            exchange.status,
            extra={
                "request_id": caller.request_id,
                "tenant": caller.tenant,
                "outcome": outcome,
                "duration_s": round(duration_s, 4),
            },
        )

    async def _answer_health(self, path: str, send: Send) -> None:
        missing = self._health.missing() if path == _READY else ""
        body = f"not ready: {missing}\n" if missing else "ok\n"
        await send(_start(503 if missing else 200, [(b"content-type", b"text/plain")], len(body)))
        await send({"type": "http.response.body", "body": body.encode()})


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
        await self._send(_start(status, all_headers, len(body)))
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


class _Body:
    """The request's body on its way in, counted."""

    def __init__(self, receive: Receive, max_bytes: int, timeout_s: float | None, caller: Caller) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._complete = False
        self._caller = caller
        self._read_bytes = 0
        self._began_s = asyncio.get_running_loop().time()
        self.disconnected = False

    async def receive(self) -> Message:
        # Behind its body a request is read for its end only, for as long as it is answered.
        message = await self._receive() if self._complete else await self._receive_in_time()
        if message["type"] == "http.request":
            self._complete = not message.get("more_body")
            self._read_bytes += len(message.get("body", b""))
            self.check(self._read_bytes)
        elif message["type"] == "http.disconnect":
            self.disconnected = True
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


def _start(status: int, headers: list[tuple[bytes, bytes]], body_bytes: int) -> Message:
    headers = [*headers, (b"content-length", str(body_bytes).encode())]
    return {"type": "http.response.start", "status": status, "headers": headers}


def _request_id(headers: dict[bytes, bytes]) -> str:
    given = headers.get(b"x-request-id", b"")
    return given.decode() if _REQUEST_ID.match(given) else uuid.uuid4().hex


def _declared_bytes(headers: dict[bytes, bytes]) -> int:
    declared = headers.get(b"content-length", b"")
    return int(declared) if declared.isdigit() else 0


def _outcome(status: int, caller: Caller, disconnected: bool) -> str:
    if disconnected:
        return "disconnected"
    if status in (429, 503):
        return "refused"
    if 400 <= status < 500:
        return "client_error"
    return "ok" if 200 <= status < 400 and caller.failure is None else "error"
