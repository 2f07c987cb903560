"""Pages on their way from DRAM to the storage classes, behind the engine's back and within bounds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.v1.kv_offload.base import get_offload_block_hash, get_offload_group_idx

from llmserve.kvstore.keys import PageKey
from llmserve.kvstore.quantize import Bytes
from llmserve.kvstore.tiers import Tiers

if TYPE_CHECKING:
    from vllm.v1.kv_offload.base import ReqContext


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A page in DRAM that is to be kept."""

    key: PageKey
    parent: bytes
    """Hash of the block before it, empty if that is not known."""
    page: Bytes
    """Its chunk of DRAM, which stays as it is until the page is encoded."""


class WriteBehind:
    """Encodes pages one after the other, since each waits in DRAM until then, and writes several at once. What is
    encoded and not written yet is at most ``waiting_bytes``: a slow class holds chunks of DRAM, not more memory.
    Belongs to the tiers' event loop."""

    def __init__(self, tiers: Tiers, waiting_bytes: int, parallel: int) -> None:
        self._tiers = tiers
        self._room = waiting_bytes
        self._changed = asyncio.Condition()
        self._slots = asyncio.Semaphore(parallel)

    async def keep(self, pages: Sequence[Outgoing], encoded: Callable[[int], None]) -> list[bool]:
        """Which of ``pages`` are kept in the end. ``encoded`` is called once, with the bytes to be written, when
        their chunks are free."""
        moved = 0
        writes: list[asyncio.Task[None]] = []
        kept = [False] * len(pages)
        try:
            for position, outgoing in enumerate(pages):
                if await self._tiers.has(outgoing.key):
                    kept[position] = True
                    continue
                async with self._changed:
                    await self._changed.wait_for(lambda: self._room > 0)
                data = await self._tiers.encoded(outgoing.key, outgoing.page, outgoing.parent)
                if data is None:
                    continue
                self._room -= len(data)
                moved += len(data)
                writes.append(asyncio.create_task(self._write(position, kept, outgoing, data)))
        finally:
            encoded(moved)
        await asyncio.gather(*writes)
        return kept

    async def _write(self, position: int, kept: list[bool], outgoing: Outgoing, data: bytes) -> None:
        try:
            async with self._slots:
                kept[position] = await self._tiers.write(outgoing.key, data, parent=outgoing.parent)
        finally:
            self._room += len(data)
            async with self._changed:
                self._changed.notify_all()


def parents_of(context: ReqContext, keys: Collection[bytes]) -> dict[bytes, bytes]:
    """Block hash of the page before each of ``keys`` in the request's prefix, where it is known."""
    positions: dict[bytes, int] = getattr(context, "_offload_key_positions", {})
    wanted = set(keys)
    before: dict[int, bytes] = {}
    found: dict[bytes, bytes] = {}
    for key in sorted(positions, key=positions.__getitem__):
        group = get_offload_group_idx(key)
        if bytes(key) in wanted and group in before:
            found[bytes(key)] = before[group]
        before[group] = get_offload_block_hash(key)
    return found
