"""Times of last use, which the stores keep: renewed for many pages at once."""

from __future__ import annotations

import time

_EVERY_S = 30.0


class Uses:
    """Pages that were used since the stores were told last, by storage class."""

    def __init__(self) -> None:
        self._used: dict[str, set[str]] = {}
        self._told_s = time.monotonic()

    def add(self, name: str, path: str) -> None:
        self._used.setdefault(name, set()).add(path)

    def due(self) -> dict[str, list[str]]:
        """What is to be told now; it counts as told."""
        if time.monotonic() - self._told_s < _EVERY_S:
            return {}
        self._told_s = time.monotonic()
        used, self._used = self._used, {}
        return {name: list(paths) for name, paths in used.items()}
