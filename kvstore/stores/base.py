"""Where encoded pages lie below DRAM: one interface over filesystems and object stores."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence

import msgspec

_AT_ONCE = 128
"""Paths of a question with a deadline that are asked for in one call: what was found before it counts."""


class StoreError(Exception):
    """The store did not do it: full, read-only, out of reach, too slow, refused. The message is one line."""


class Stored(msgspec.Struct, frozen=True, gc=False):
    """One object of a listing."""

    path: str
    size_bytes: int
    used_s: float
    """Unix time of its last ``touch``, or of its writing."""


class PageStore(ABC):
    """Bytes by path. Belongs to one event loop; its methods never block it."""

    name: str
    """Of the storage class."""
    shared: bool
    """Every node reaches it."""

    @abstractmethod
    async def read(self, path: str) -> bytes | None:
        """The whole object, None if there is none. Raises ``StoreError``."""

    @abstractmethod
    async def head(self, path: str, size_bytes: int) -> bytes | None:
        """Its first bytes. Raises ``StoreError``."""

    @abstractmethod
    async def write(self, path: str, data: bytes) -> None:
        """Make the object exist with all of ``data``, or not at all. Raises ``StoreError``."""

    @abstractmethod
    async def contains(self, paths: Sequence[str]) -> int:
        """How many of ``paths``, from the first on, exist without a gap. Raises ``StoreError``."""

    async def contains_within(self, paths: Sequence[str], within_s: float) -> int:
        """``contains``, but after ``within_s`` only as many as are known by then. Raises ``StoreError``, also if
        nothing is known."""
        count = 0
        try:
            async with asyncio.timeout(within_s):
                while batch := paths[count : count + _AT_ONCE]:
                    more = await self.contains(batch)
                    count += more
                    if more < len(batch):
                        break
        except TimeoutError as error:
            if not count:
                raise self._silent(paths, within_s) from error
        return count

    def _silent(self, paths: Sequence[str], within_s: float) -> StoreError:
        return StoreError(f"{self.name}: no answer within {within_s:g} s which of {len(paths)} pages it has")

    @abstractmethod
    async def delete(self, paths: Sequence[str]) -> None:
        """Remove objects; those that are not there are ignored. Raises ``StoreError``."""

    @abstractmethod
    async def touch(self, paths: Sequence[str]) -> None:
        """Note that these were used now. Raises ``StoreError``."""

    @abstractmethod
    def listing(self, prefix: str) -> AsyncIterator[list[Stored]]:
        """All objects whose path starts with ``prefix``, in batches. Raises ``StoreError``."""

    async def expect(self, paths: Sequence[str]) -> None:  # noqa: B027  # a hint: most stores have no use for it
        """These will be read soon."""

    @abstractmethod
    async def close(self) -> None:
        """Never raises."""
