"""What stands between the socket and vLLM's server: identity, limits, request ids, health, errors. Pure ASGI."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from dataclasses import dataclass
from http import HTTPStatus
from typing import Protocol

from starlette.types import ASGIApp, Receive, Scope, Send

from llmserve.gateway.access import Access, is_upload, no_such_model
from llmserve.gateway.caller import Caller, Failure, current_caller
from llmserve.gateway.exchange import Exchange, response_start
from llmserve.gateway.identity import Denied
from llmserve.gateway.limits import LimitExceeded
from llmserve.gateway.metrics import GatewayMetrics
from llmserve.gateway.request_body import BodyRefused, RequestBody

log = logging.getLogger("llmserve.gateway.access")

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}\Z")
_LIVE, _READY = "/health/live", "/health/ready"


class Health(Protocol):
    def missing(self) -> str:
        """What is missing for serving, or nothing."""


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
            await exchange.send(response_start(200, [(b"content-type", b"application/json")], len(body)))
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
        body = RequestBody(receive, max_bytes, bounds.body_timeout_s, caller)
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
            self._record(scope, exchange, caller, disconnected=caller.disconnected and not exchange.complete)
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
        await send(response_start(503 if missing else 200, [(b"content-type", b"text/plain")], len(body)))
        await send({"type": "http.response.body", "body": body.encode()})


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
