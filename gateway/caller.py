"""Who is calling: bound to the task that serves an HTTP request, and inherited by every task it starts."""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmserve.gateway.limits import TenantLimiter

DEFAULT_TENANT = "default"
INTERACTIVE = "interactive"
"""Class of requests that a client waits for."""
BATCH = "batch"
"""Class of requests that nobody waits for."""


@dataclass(slots=True)
class Caller:
    """One HTTP request, as the parts around vLLM's server share it."""

    tenant: str
    request_id: str
    klass: str = INTERACTIVE
    received_s: float = field(default_factory=time.monotonic)
    """Monotonic time."""
    accepted: bool = False
    """Whether the bus has taken a request of this caller."""
    disconnected: bool = False
    """Whether the client has gone."""
    failure: Failure | None = None
    limiter: TenantLimiter | None = None
    """The tenant's limits."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why the gateway ends a request; becomes the HTTP response unless one has begun."""

    status: HTTPStatus
    kind: str
    """``error.type`` of the response."""
    message: str
    retry_after_s: int | None = None


current_caller: ContextVar[Caller | None] = ContextVar("llmserve_caller", default=None)
