"""Times of last use, which the stores keep: renewed for many pages at once."""

from __future__ import annotations

from collections.abc import Sequence

from llmserve.workers.kv_classes import KeptClass

EVERY_S = 30.0


class Uses:
    """Pages that were used since their stores were told last, by storage class."""

    def __init__(self, classes: Sequence[KeptClass]) -> None:
        self._used: dict[str, set[str]] = {kept.name: set() for kept in classes}

    def add(self, name: str, path: str) -> None:
        """A page was used; those of classes that are not there are ignored."""
        if (used := self._used.get(name)) is not None:
            used.add(path)

    async def tell(self, kept: KeptClass) -> None:
        """Tell the class's store; what it does not take is not told again."""
        used, self._used[kept.name] = self._used[kept.name], set()
        if used:
            await kept.guarded(f"renewing {len(used)} times of use", lambda: kept.store.touch(list(used)))
