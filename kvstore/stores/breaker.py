"""Circuit breaker: what fails again and again is left alone for a while. Pure; times are given."""

from __future__ import annotations


class Breaker:
    """Closed until ``failures`` calls in a row fail; then open for ``cool_down_s``, after which one call may try.

    If the trial fails too it is open again for twice as long, ``longest_s`` at most (Nygard, Release It!, 2007).
    """

    def __init__(self, failures: int = 3, cool_down_s: float = 1.0, longest_s: float = 30.0) -> None:
        self._limit = failures
        self._first_s = cool_down_s
        self._longest_s = longest_s
        self._failed = 0
        self._cool_down_s = cool_down_s
        self._until_s: float | None = None

    @property
    def is_open(self) -> bool:
        """Since the last failure nothing has succeeded."""
        return self._until_s is not None

    def allows(self, now_s: float) -> bool:
        """Whether a call may be made now; of an open one this is the trial, and others wait for its outcome."""
        if not self.would_allow(now_s):
            return False
        if self._until_s is not None:
            self._until_s = now_s + self._cool_down_s
        return True

    def would_allow(self, now_s: float) -> bool:
        """What ``allows`` would say, without taking the trial; may be asked from any thread."""
        until_s = self._until_s
        return until_s is None or now_s >= until_s

    def succeeded(self) -> None:
        self._failed = 0
        self._cool_down_s = self._first_s
        self._until_s = None

    def failed(self, now_s: float) -> bool:
        """Note a failure; True if it opened the breaker, for the log."""
        self._failed += 1
        if self._until_s is not None:
            self._cool_down_s = min(2 * self._cool_down_s, self._longest_s)
            self._until_s = now_s + self._cool_down_s
            return False
        if self._failed < self._limit:
            return False
        self._until_s = now_s + self._cool_down_s
        return True
