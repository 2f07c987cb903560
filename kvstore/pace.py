"""How long a storage class takes for a page, of late, and whether that is worth it. No I/O; times are given."""

from __future__ import annotations

_KEEP = 0.9
"""Weight of all earlier pages against a new one."""
_ENOUGH = 4
"""Pages that must have been loaded before a class is left out."""
_SLACK = 1.5
"""Times as long as computing: both are measured while other work goes on, and only what is clearly slower counts."""
_AGAIN_S = 30.0
"""After which a class that was too slow is tried again."""


class LoadPace:
    """Loads that overlap count once: what matters is how long a prefix takes, not each of its pages."""

    def __init__(self) -> None:
        self._running = 0
        self._since_s = 0.0
        self._loaded = 0
        self._pages = 0.0
        self._seconds = 0.0
        self._last_s = 0.0

    def begin(self, now_s: float) -> None:
        if not self._running:
            self._since_s = now_s
        self._running += 1

    def end(self, now_s: float, *, loaded: bool) -> float:
        """A load ended; returns the seconds since the last one, or since it began; 0 for a miss: it says nothing."""
        spent_s, self._since_s = now_s - self._since_s, now_s
        self._running -= 1
        if not loaded:
            return 0.0
        self._loaded += 1
        self._last_s = now_s
        self._pages = _KEEP * self._pages + 1
        self._seconds = _KEEP * self._seconds + spent_s
        return spent_s

    @property
    def page_s(self) -> float:
        """Seconds for a page; 0 while nothing is known."""
        return self._seconds / self._pages if self._pages else 0.0

    def worth(self, compute_s: float, now_s: float) -> bool:
        """Whether pages that take ``compute_s`` each to compute had better be loaded."""
        return self._loaded < _ENOUGH or self.page_s <= _SLACK * compute_s or now_s - self._last_s > _AGAIN_S
