"""What stands between the socket and vLLM's server: identity, limits, request ids, health, errors. Pure ASGI."""

from __future__ import annotations

import logging
import re
import time
import uuid
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmserve.gateway.caller import Caller, Failure, current_caller
from llmserve.gateway.errors import error_body
from llmserve.gateway.identity import ApiKeys
from llmserve.gateway.metrics import GatewayMetrics

log = logging.getLogger("llmserve.gateway.access")

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}\Z")
_LIVE, _READY = "/health/live", "/health/ready"


class Health(Protocol):
    def missing(self) -> str:
        """What is missing for serving, or nothing."""


class BodyTooLarge(Exception):
    """The body grew beyond the limit while it was read."""


class GatewayMiddleware:
    """Wraps vLLM's server. ``max_body_bytes`` bounds a request's body."""

    def __init__(
        self, app: ASGIApp, keys: ApiKeys, health: Health, metrics: GatewayMetrics, *, max_body_bytes: int
    ) -> None:
        self._app = app
        self._keys = keys
        self._health = health
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes

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
        tenant = self._keys.tenant_of(headers)
        if tenant is None:
            await exchange.refuse(401, "AuthenticationError", "Missing or unknown API key", [_CHALLENGE])
            self._record(scope, exchange, Caller("unknown", exchange.request_id), disconnected=False)
            return
        await self._serve(scope, receive, exchange, Caller(tenant, exchange.request_id), headers)

    async def _serve(
        self, scope: Scope, receive: Receive, exchange: Exchange, caller: Caller, headers: dict[bytes, bytes]
    ) -> None:
        exchange.caller = caller
        body = _Body(receive, self._max_body_bytes, caller)
        token = current_caller.set(caller)
        self._metrics.open_requests.inc()
        try:
            body.check(_declared_bytes(headers))
            await self._app(scope, body.receive, exchange.send)
            await exchange.finish()
        except BodyTooLarge:
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
            await self._replace(self.caller)
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
            if failure is not None and self.caller is not None:
                await self._replace(self.caller)
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
        await self._send(_start(status, all_headers, len(body)))
        await self._send({"type": "http.response.body", "body": body})

    async def _replace(self, caller: Caller) -> None:
        failure = caller.failure
        assert failure is not None
        headers = []
        if failure.retry_after_s is not None:
            headers.append((b"retry-after", str(failure.retry_after_s).encode()))
        await self.refuse(failure.status, failure.kind, failure.message, headers)

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
            message = {**message, "headers": [*headers, (b"x-request-id", self.request_id.encode())]}
        elif message["type"] == "http.response.body" and not message.get("more_body"):
            self.complete = True
        await self._send(message)


class _Body:
    """The request's body on its way in, counted."""

    def __init__(self, receive: Receive, max_bytes: int, caller: Caller) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._caller = caller
        self._read_bytes = 0
        self.disconnected = False

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._read_bytes += len(message.get("body", b""))
            self.check(self._read_bytes)
        elif message["type"] == "http.disconnect":
            self.disconnected = True
        return message

    def check(self, size_bytes: int) -> None:
        """Raise ``BodyTooLarge`` and note the failure: FastAPI makes a 400 of whatever a body raises."""
        if size_bytes > self._max_bytes:
            text = f"The body is larger than {self._max_bytes} bytes"
            self._caller.failure = Failure(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "RequestTooLargeError", text)
            raise BodyTooLarge


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
