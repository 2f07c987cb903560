"""What pages follow that were there before the kv role started: it stands in their headers.

Workers tell it of the pages that they write; of the rest the kv role reads the first bytes, those used last first, a
few at a time, so that ``prefetch_on_prefix`` knows prefixes older than itself."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from llmserve.kvstore.codec import HEADER_BYTES, BadPage, read_header
from llmserve.kvstore.manager import Manager
from llmserve.kvstore.stores.base import PageStore, StoreError

logger = logging.getLogger(__name__)

_ROUND_S = 0.2
_AT_ONCE = 200
"""1,000 pages a second at most."""


class Lineage:
    """Belongs to the keeper's event loop."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager
        self._unread: list[tuple[PageStore, str]] = []

    def ask(self, store: PageStore, paths: Iterable[str]) -> None:
        """Read what these follow; of ``paths`` the last ones first."""
        self._unread.extend((store, path) for path in paths)

    async def learn(self) -> float:
        """Read the next few; the seconds until the ones after them."""
        batch = [self._unread.pop() for _ in range(min(_AT_ONCE, len(self._unread)))]
        await asyncio.gather(*(self._read(store, path) for store, path in batch))
        return _ROUND_S

    async def _read(self, store: PageStore, path: str) -> None:
        try:
            data = await store.head(path, HEADER_BYTES)
            if data is not None and (parent := read_header(data).parent):
                self._manager.follows(path, parent)
        except (StoreError, BadPage) as problem:
            # A page without a known place in a prefix is served all the same.
            logger.debug("what %s follows stays unknown: %s", path, problem)
