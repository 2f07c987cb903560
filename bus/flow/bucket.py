"""A token bucket over the bytes of KV transfers."""

from __future__ import annotations

import math

_ROUNDING = 1e-3
"""Of an amount, so that what ``wait_s`` promised is there in time."""


class Bucket:
    """Lets through at most ``rate_per_s`` on average and ``burst_s`` seconds' worth at once.

    Something larger than a burst passes when the bucket is full and leaves it in debt, so that over any interval of t
    seconds at most rate x (t + burst) and one such thing pass.
    """

    def __init__(self, rate_per_s: float | None, burst_s: float = 1.0) -> None:
        """None: no bound."""
        self._rate = rate_per_s
        self._burst = 0.0 if rate_per_s is None else rate_per_s * burst_s
        self._level = self._burst
        self._at_s = -math.inf

    def has(self, amount: float, now_s: float) -> bool:
        """Whether ``amount`` may pass now."""
        if self._rate is None:
            return True
        self._refill(now_s)
        return self._level + _ROUNDING >= min(amount, self._burst)

    def take(self, amount: float, now_s: float) -> None:
        """``amount`` passes."""
        if self._rate is not None:
            self._refill(now_s)
            self._level -= amount

    def take_at_most(self, amount: float, now_s: float) -> float:
        """Of ``amount`` what is there passes; returns how much that is."""
        if self._rate is None:
            return amount
        self._refill(now_s)
        passed = min(amount, max(0.0, self._level))
        self._level -= passed
        return passed

    @property
    def debt(self) -> float:
        """What passed before it was there, by the last time that was told."""
        return max(0.0, -self._level)

    def elapse(self, now_s: float) -> None:
        """Time went on."""
        if self._rate is not None:
            self._refill(now_s)

    def wait_s(self, amount: float, now_s: float) -> float:
        """Seconds until ``amount`` may pass, if nothing else does."""
        if self._rate is None or self.has(amount, now_s):
            return 0.0
        return (min(amount, self._burst) - self._level) / self._rate

    def check(self) -> None:
        """Assert the invariants."""
        assert self._level <= self._burst, "the bucket overflows"

    def _refill(self, now_s: float) -> None:
        assert self._rate is not None
        if now_s > self._at_s:
            if math.isfinite(self._at_s):
                self._level = min(self._burst, self._level + (now_s - self._at_s) * self._rate)
            self._at_s = now_s
