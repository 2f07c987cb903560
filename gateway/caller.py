"""Who is calling: bound to the task that serves an HTTP request, and inherited by every task it starts."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from http import HTTPStatus

DEFAULT_TENANT = "default"
INTERACTIVE = "interactive"
"""Class of requests that a client waits for."""


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
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """Why the gateway ends a request; becomes the HTTP response unless one has begun."""

    status: HTTPStatus
    kind: str
    """``error.type`` of the response."""
    message: str
    retry_after_s: int | None = None


current_caller: ContextVar[Caller | None] = ContextVar("llmserve_caller", default=None)


def cache_salts(deployment: str, tenants: Sequence[str], sharing: Mapping[str, Sequence[str]]) -> dict[str, bytes]:
    """Cache salt of each tenant; those of one sharing group have the same. A tenant belongs to one group at most."""
    salts = {tenant: _salt(deployment, f"tenant/{tenant}") for tenant in tenants}
    for group, members in sharing.items():
        salts.update(dict.fromkeys(members, _salt(deployment, f"group/{group}")))
    return salts


def _salt(deployment: str, owner: str) -> bytes:
    return hmac.digest(deployment.encode(), owner.encode(), hashlib.sha256)


def request_salt(tenant_salt: bytes, client_salt: str | None) -> str:
    """Cache salt of a request: the tenant's, divided further by the client's own salt if it gave one."""
    if client_salt is None:
        return tenant_salt.hex()
    return hmac.new(tenant_salt, client_salt.encode(), hashlib.sha256).hexdigest()
