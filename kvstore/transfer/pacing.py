"""Token bucket that paces the start of transfers to a rate."""

from __future__ import annotations

import math
import threading


class TokenBucket:
    """Grants bytes at ``rate_bytes_s``, with bursts of at most ``burst_bytes``; for several threads.

    What is taken may overdraw the bucket, so that a transfer larger than the burst passes as well; the next one
    waits until the debt is paid. Over any interval of t seconds at most ``rate * t + burst`` and one transfer are
    granted. A rate of ``math.inf`` grants everything.
    """

    def __init__(self, rate_bytes_s: float, burst_bytes: float, now_s: float) -> None:
        if rate_bytes_s <= 0 or burst_bytes <= 0:
            raise ValueError(f"rate {rate_bytes_s} and burst {burst_bytes} must be positive")
        self._rate = rate_bytes_s
        self._burst = burst_bytes
        self._level = burst_bytes
        self._at_s = now_s
        self._lock = threading.Lock()

    def take(self, size_bytes: int, now_s: float) -> bool:
        """Whether a transfer of ``size_bytes`` may start now; if so it is charged."""
        if math.isinf(self._rate):
            return True
        with self._lock:
            self._level = min(self._burst, self._level + (now_s - self._at_s) * self._rate)
            self._at_s = now_s
            if self._level <= 0:
                return False
            self._level -= size_bytes
        return True

    def wait_s(self, now_s: float) -> float:
        """Seconds from ``now_s`` until something is granted again."""
        if math.isinf(self._rate):
            return 0.0
        level = self._level + (now_s - self._at_s) * self._rate
        return max(0.0, -level / self._rate)
