"""Runs requests that came in no HTTP connection: lines of batches, and what direct publishers send."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus

import msgspec
from starlette.types import ASGIApp, Message

from llmserve.gateway.caller import BATCH, Caller, Failure, current_caller
from llmserve.gateway.errors import error_body
from llmserve.gateway.exchange import Exchange
from llmserve.gateway.limits import TenantLimiter
from llmserve.gateway.metrics import GatewayMetrics
from llmserve.manifests.schema import Limits

_PASSING = frozenset({HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE})
_PAUSE_S = (0.25, 5.0)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The response of one request."""

    status: int
    body: bytes
    """JSON."""


class Executor:
    """``app`` is vLLM's server; ``limits`` finds the tenant's."""

    def __init__(
        self,
        app: ASGIApp,
        may_use_model: Callable[[TenantLimiter | None], bool],
        limits: Callable[[str], TenantLimiter | None],
        metrics: GatewayMetrics,
    ) -> None:
        self._app = app
        self._may_use_model = may_use_model
        self._limits = limits
        self._metrics = metrics

    async def run(self, tenant: str, url: str, body: bytes, request_id: str) -> Outcome:
        """The response; waits and tries again for as long as the queue is full or the deployment not there."""
        pause_s, longest_s = _PAUSE_S
        while True:
            outcome = await self._once(tenant, url, body, request_id)
            if outcome.status not in _PASSING:
                return outcome
            await asyncio.sleep(pause_s)
            pause_s = min(longest_s, pause_s * 1.5)

    async def _once(self, tenant: str, url: str, body: bytes, request_id: str) -> Outcome:
        limiter = self._limits(tenant)
        if not self._may_use_model(limiter):
            return _refused(Failure(HTTPStatus.NOT_FOUND, "NotFoundError", "The model does not exist."))
        if _streams(body):
            return _refused(Failure(HTTPStatus.BAD_REQUEST, "BadRequestError", "stream is not possible here"))
        caller = Caller(tenant, request_id, klass=BATCH, limiter=_without_minutes(limiter))
        # A task of its own, so that the caller is bound to it alone.
        return await asyncio.create_task(self._answer(caller, url, body))

    async def _answer(self, caller: Caller, url: str, body: bytes) -> Outcome:
        current_caller.set(caller)
        collected = bytearray()
        gone = asyncio.Event()
        asked = False

        async def receive() -> Message:
            nonlocal asked
            if not asked:
                asked = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.body":
                collected.extend(message.get("body", b""))

        exchange = Exchange(send, caller.request_id)
        exchange.caller = caller
        try:
            await self._app(_scope(url, len(body)), receive, exchange.send)
        except Exception as error:
            # vLLM's handler has answered, or nobody has; either way it is logged there.
            if caller.failure is None and not exchange.status:
                text = f"Internal server error: {type(error).__name__}"
                caller.failure = Failure(HTTPStatus.INTERNAL_SERVER_ERROR, "InternalServerError", text)
        await exchange.finish()
        duration_s = time.monotonic() - caller.received_s
        outcome = "ok" if exchange.status == 200 else "refused" if exchange.status in _PASSING else "error"
        self._metrics.batch_requests.labels(caller.tenant, outcome).inc()
        self._metrics.batch_seconds.labels(caller.tenant).observe(duration_s)
        return Outcome(exchange.status, bytes(collected))


def new_request_id() -> str:
    return f"req-{uuid.uuid4().hex}"


def _without_minutes(limiter: TenantLimiter | None) -> TenantLimiter | None:
    """Batch work waits for free slots: what it may ask for is bounded, not how much of it in a minute."""
    if limiter is None or limiter.limits.max_context_tokens is None:
        return None
    return TenantLimiter(limiter.tenant, Limits(max_context_tokens=limiter.limits.max_context_tokens), 0.0)


class _Streaming(msgspec.Struct):
    stream: object = False


def _streams(body: bytes) -> bool:
    try:
        return bool(msgspec.json.decode(body, type=_Streaming).stream)
    except msgspec.MsgspecError:
        return False  # vLLM says what is wrong with it


def _refused(failure: Failure) -> Outcome:
    return Outcome(failure.status, error_body(failure.status, failure.kind, failure.message))


def _scope(url: str, body_bytes: int) -> dict[str, object]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": url,
        "raw_path": url.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(body_bytes).encode())],
        "client": None,
        "server": ("batch", 80),
        "state": {},
    }
