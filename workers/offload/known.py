"""What a worker knows of the pages below DRAM, so that most lookups need no look. No I/O; times are given."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

NamedPage = tuple[str, bytes]
"""(space, vLLM's key: block hash and group)."""

_KNOWN = 500_000
"""Pages remembered to be there: 100 MB at most."""
_MISSING_S = 0.5
"""For which a page that was looked for is not looked for again."""
_LOST_S = 5.0
"""For which one that could not be loaded is not: longer than a step, so that who asked for it computes it. Its class
may say for ever that it has it."""


class KnownPages:
    """Pages that are there, pages that were not there just now, and questions about the rest.

    A page may be gone although it is known: then loading it fails, and it is lost until it is written anew. One that
    was missing may be there soon: another worker wrote it.
    """

    def __init__(self) -> None:
        self._there: OrderedDict[NamedPage, None] = OrderedDict()
        self._missing: dict[NamedPage, float] = {}
        """Until when it counts as missing."""
        self._lost: dict[NamedPage, float] = {}
        """Likewise, of those that could not be loaded and were not written since."""
        self._asked: set[NamedPage] = set()
        self._questions: dict[str, list[NamedPage]] = {}
        """Of this step, by request: a prefix, in order."""

    def __contains__(self, page: NamedPage) -> bool:
        return page in self._there

    def look(self, page: NamedPage, request_id: str, now_s: float) -> bool | None:
        """Whether the page is there; None: it is asked for, come again."""
        if page in self._there:
            return True
        if self._missing.get(page, 0.0) > now_s or self._lost.get(page, 0.0) > now_s:
            return False
        if page not in self._asked:
            self._asked.add(page)
            self._questions.setdefault(request_id, []).append(page)
        return None

    def questions(self) -> list[list[NamedPage]]:
        """Pages to be looked for since the last call: a list for each request."""
        questions, self._questions = self._questions, {}
        return list(questions.values())

    def answer(self, pages: Sequence[NamedPage], there: int, now_s: float) -> None:
        """Of ``pages`` the first so many are there, as their classes say."""
        if len(self._missing) > _KNOWN:
            self._missing.clear()
        for number, page in enumerate(pages):
            self._asked.discard(page)
            if number >= there:
                self._missing[page] = now_s + _MISSING_S
            elif self._lost.get(page, 0.0) <= now_s:
                self._add(page)

    def written(self, page: NamedPage) -> None:
        """The page is there, whole."""
        self._lost.pop(page, None)
        self._add(page)

    def _add(self, page: NamedPage) -> None:
        self._there[page] = None
        self._there.move_to_end(page)
        self._missing.pop(page, None)
        while len(self._there) > _KNOWN:
            self._there.popitem(last=False)

    def lost(self, pages: Iterable[NamedPage], now_s: float) -> None:
        """They could not be loaded."""
        if len(self._lost) > _KNOWN:
            self._lost.clear()
        for page in pages:
            self._there.pop(page, None)
            self._lost[page] = now_s + _LOST_S

    def is_lost(self, page: NamedPage) -> bool:
        """Whoever says that it has the page could not yield it when it was read last."""
        return page in self._lost
