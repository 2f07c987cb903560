"""How long a storage class takes for a page, of late, and whether that is worth it. No I/O; times are given."""

from __future__ import annotations

_KEEP = 0.9
"""Weight of all earlier pages against a new one."""
_ENOUGH = 4
"""Loads that must have ended before a class is left out."""
_SLACK = 1.5
"""Times as long as computing: both are measured while other work goes on, and only what is clearly slower counts."""
_AGAIN_S = 30.0
"""Without a load, after which a class that was too slow is tried again, and measured anew."""


class LoadPace:
    """Loads that overlap count once: what matters is how long a prefix takes, not each of its pages."""

    def __init__(self) -> None:
        self._running = 0
        self._since_s = 0.0
        self._tried = 0
        self._pages = 0.0
        self._seconds = 0.0
        self._last_s = 0.0

    def begin(self, now_s: float) -> None:
        if not self._running:
            self._since_s = now_s
            if now_s - self._last_s > _AGAIN_S:
                # A class that hung is itself again, or not: what it did then says nothing of it.
                self._tried, self._pages, self._seconds = 0, 0.0, 0.0
        self._running += 1

    def end(self, now_s: float, *, loaded: bool | None) -> float:
        """A load ended; returns the seconds since the last one, or since it began, in which a page was loaded.

        False: it failed, and took its time for nothing. None: a miss, which says nothing.
        """
        spent_s, self._since_s = now_s - self._since_s, now_s
        self._running -= 1
        if loaded is None:
            return 0.0
        self._tried += 1
        self._last_s = now_s
        self._pages = _KEEP * self._pages + loaded
        self._seconds = _KEEP * self._seconds + spent_s
        return spent_s if loaded else 0.0

    @property
    def page_s(self) -> float:
        """Seconds for a page; 0 while nothing is known, all that was spent where hardly any page came."""
        return self._seconds / max(1.0, self._pages)

    def worth(self, compute_s: float, now_s: float) -> bool:
        """Whether pages that take ``compute_s`` each to compute had better be loaded."""
        return self._tried < _ENOUGH or self.page_s <= _SLACK * compute_s or now_s - self._last_s > _AGAIN_S
