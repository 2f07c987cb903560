"""A rate as it was of late."""

from __future__ import annotations

KEEP = 0.9
"""Weight of all earlier samples against a new one."""


class Rate:
    """Amounts over the time they took; recent samples count most, long ones more than short ones."""

    def __init__(self) -> None:
        self._amount = 0.0
        self._seconds = 0.0

    def add(self, amount: float, seconds: float) -> None:
        self._amount = KEEP * self._amount + amount
        self._seconds = KEEP * self._seconds + seconds

    @property
    def per_s(self) -> float:
        """0 while nothing is known."""
        return self._amount / self._seconds if self._seconds > 0 else 0.0
