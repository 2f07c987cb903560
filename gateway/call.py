"""One open request, as the gateway's end of the bus keeps it, and what arrives for it."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from llmserve.bus.messages import Delta, Reason
from llmserve.gateway.attempts import Attempts
from llmserve.gateway.codec import RequestCodec
from llmserve.gateway.metrics import TenantMetrics


@dataclass(slots=True, eq=False)
class Call:
    """One open request."""

    local_id: str
    """The caller's name for it."""
    tenant: str
    klass: str
    codec: RequestCodec
    attempts: Attempts
    metrics: TenantMetrics
    received_s: float
    """Monotonic time at which the client's request came in, for the time to the first token."""
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created_s: float = field(default_factory=time.time)
    progress_s: float = field(default_factory=time.monotonic)
    """Monotonic time of the last token, or of the start."""
    first_token_s: float | None = None
    cached_tokens: int = 0
    """Of its prompt, as its first delta says."""
    deaths: int = 0
    """Workers that died while they ran it, as the router counts."""
    probed_s: float = 0.0
    """Monotonic time of the last look for it on the stream."""
    probing: bool = False
    on_end: Callable[[int], None] | None = None
    """Called once, with the output tokens received, however the request ends."""
    missing_since_s: float | None = None
    """Monotonic time since which the stream is known not to hold the request any more."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """Part of a delta that is new."""

    local_id: str
    delta: Delta
    skip: int
    """Tokens of ``delta`` that are known already."""
    reason: Reason | None
