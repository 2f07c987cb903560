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
    anew: bool = False
    """To be written even where it seems to be: what is there could not be read."""


class WriteBehind:
    """Encodes pages one after the other, since each waits in DRAM until then, and writes several at once. What is
    encoded and not written yet is at most ``waiting_bytes``, or one page: a slow class holds chunks of DRAM, not more
    memory. Belongs to the tiers' event loop."""

    def __init__(self, tiers: Tiers, waiting_bytes: int, parallel: int) -> None:
        self._tiers = tiers
        self._bound_bytes = waiting_bytes
        self._waiting_bytes = 0
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
                if not outgoing.anew and await self._tiers.has(outgoing.key):
                    kept[position] = True
                elif (data := await self._encoded(outgoing)) is not None:
                    moved += len(data)
                    writes.append(asyncio.create_task(self._write(position, kept, outgoing, data)))
        finally:
            encoded(moved)
        await asyncio.gather(*writes)
        return kept

    async def _encoded(self, outgoing: Outgoing) -> bytes | None:
        """What is to be written, which waits from now on; None if it is dropped."""
        most_bytes = self._tiers.most_bytes
        async with self._changed:
            await self._changed.wait_for(
                lambda: not self._waiting_bytes or self._waiting_bytes + most_bytes <= self._bound_bytes
            )
            # Before it is encoded: others wait for the same room.
            self._waiting_bytes += most_bytes
        data: bytes | None = None
        try:
            data = await self._tiers.encoded(outgoing.key, outgoing.page, outgoing.parent)
        finally:
            await self._release(most_bytes - len(data or b""))
        return data

    async def _write(self, position: int, kept: list[bool], outgoing: Outgoing, data: bytes) -> None:
        try:
            async with self._slots:
                kept[position] = await self._tiers.write(outgoing.key, data, parent=outgoing.parent)
        finally:
            await self._release(len(data))

    async def _release(self, size_bytes: int) -> None:
        self._waiting_bytes -= size_bytes
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
