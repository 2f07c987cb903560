"""The page mover of one rank: its engines opened, all memory registered, room for probes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmserve.kvstore.transfer import SAME_HOST, open_engine, open_ladder
from llmserve.kvstore.transfer.base import EngineOptions, Place, Region, TransferEngine, TransferError
from llmserve.kvstore.transfer.mover import Mover
from llmserve.kvstore.transfer.pacing import TokenBucket

logger = logging.getLogger("vllm.llmserve.connector")

_PROBE_BYTES = {False: 8 << 20, True: 64 << 20}
"""Read by one probe, on CPUs and on GPUs."""


@dataclass(frozen=True, slots=True)
class LadderOptions:
    """``order``: engines by name, first choice first."""

    order: tuple[str, ...]
    options: EngineOptions
    piece_bytes: int
    """The runs of bytes that pages come in."""


def open_mover(ladder: LadderOptions, regions: Sequence[Region], bucket: TokenBucket) -> tuple[Mover, str]:
    """(the mover, its engines in words). Raises ``TransferError`` if no engine is usable."""
    engines, skipped = open_ladder(ladder.order, ladder.options)
    probe, owner = _probe_memory(Place(ladder.options.gpu))
    usable: list[TransferEngine] = []
    for engine in engines:
        try:
            engine.register([*regions, probe])
        except TransferError as error:
            logger.warning("transfer engine %s is skipped: %s", engine.name, error)
            skipped[engine.name] = str(error)
            engine.close()
            continue
        usable.append(engine)
    if not usable:
        raise TransferError(f"no transfer engine could register the KV cache: {skipped}")
    names = ", ".join(engine.name for engine in usable)
    reasons = "".join(f"; {name}: {reason}" for name, reason in skipped.items())
    logger.info("pages move by %s%s", names, reasons)
    express = _express(ladder.options, [*regions, probe]) if usable[0].name == SAME_HOST else None
    mover = Mover(usable, bucket, probe=probe, probe_piece_bytes=ladder.piece_bytes, owner=owner, express=express)
    return mover, names + reasons


def _express(options: EngineOptions, regions: Sequence[Region]) -> TransferEngine:
    """An engine for the engine core's own thread."""
    engine = open_engine(SAME_HOST, options)
    engine.register(regions)
    return engine


def _probe_memory(place: Place) -> tuple[Region, object]:
    """(twice the bytes of a probe: to be read, and to be written; what keeps them)."""
    import torch

    on_gpu = place.gpu is not None
    memory = torch.zeros(2 * _PROBE_BYTES[on_gpu], dtype=torch.uint8, device=f"cuda:{place.gpu}" if on_gpu else "cpu")
    return Region(memory.data_ptr(), memory.nbytes, place), memory


def device_mark(place: Place) -> Callable[[], object]:
    """A function that marks all work given to the pages' device so far."""
    if place.gpu is None:
        return lambda: None
    import torch

    def mark() -> object:
        event = torch.cuda.Event()
        event.record()
        return event

    return mark
