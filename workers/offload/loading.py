"""Pages on their way from the storage classes to DRAM."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from llmserve.kvstore.keys import PageKey
from llmserve.kvstore.quantize import Bytes
from llmserve.kvstore.tiers import Tiers

logger = logging.getLogger("vllm.llmserve.tiers")


@dataclass(frozen=True, slots=True)
class Incoming:
    """A page that is to be loaded."""

    key: PageKey
    page: Bytes
    """Its chunk of DRAM."""


async def load_all(tiers: Tiers, pages: Sequence[Incoming], compute_s: float, parallel: int) -> list[bool]:
    """Which of ``pages`` were loaded, ``parallel`` at a time, from classes worth it for one that is computed in
    ``compute_s``. Never raises."""
    slots = asyncio.Semaphore(parallel)
    # A prefix is loaded whole or not: half of it would only be late.
    among = tiers.worthy(compute_s)

    async def one(incoming: Incoming) -> bool:
        async with slots:
            return await tiers.load(incoming.key, incoming.page, among)

    loaded = await asyncio.gather(*(one(incoming) for incoming in pages), return_exceptions=True)
    for result in loaded:
        if isinstance(result, BaseException):
            logger.error("cannot load a page", exc_info=result)
    return [result is True for result in loaded]
