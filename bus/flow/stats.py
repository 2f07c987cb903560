"""What the core counted since it began."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from llmserve.bus.messages import Stage


@dataclass(slots=True)
class Stats:
    """Plain counts, for metrics and tests."""

    grants: Counter[Stage] = field(default_factory=Counter)
    confirm_timeouts: int = 0
    requeued: int = 0
    """Grants that were refused or found nobody, and went back to the head of their queue."""
    attempts_lost: Counter[str] = field(default_factory=Counter)
    """By cause: ``confirm``, ``worker``, ``inventory``, ``lease``, ``holder``, ``failed``."""
    rejected: Counter[str] = field(default_factory=Counter)
    """By code."""
    cancelled: int = 0
    finished: int = 0
    adopted: int = 0
    """Found running in a worker's inventory."""
