"""A GPU kernel that copies pieces of memory given by addresses; imports Triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy
import torch
import triton
import triton.language as tl

from llmserve.kvstore.transfer.runs import split

if TYPE_CHECKING:
    from numpy.typing import NDArray

UNIT_BYTES = 64 << 10
"""What one block of threads copies."""
_ROW_BYTES = 2 << 20
"""Of the table: longer pieces are cut, so that as many blocks for each row leave few with nothing to do."""
_WIDE = 8
_ALIGNED = 16


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _copy_kernel(table, rows, UNIT: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    begin = tl.program_id(1) * UNIT
    source = tl.load(table + row) + begin
    target = tl.load(table + rows + row) + begin
    size = tl.minimum(tl.load(table + 2 * rows + row) - begin, UNIT)
    if WIDE:
        here = tl.multiple_of(source, 16).to(tl.pointer_type(tl.int64))
        there = tl.multiple_of(target, 16).to(tl.pointer_type(tl.int64))
        count = size // 8
        for at in range(0, count, BLOCK):
            offsets = at + tl.arange(0, BLOCK)
            tl.store(there + offsets, tl.load(here + offsets, mask=offsets < count), mask=offsets < count)
    else:
        here = source.to(tl.pointer_type(tl.int8))
        there = target.to(tl.pointer_type(tl.int8))
        for at in range(0, size, BLOCK):
            offsets = at + tl.arange(0, BLOCK)
            tl.store(there + offsets, tl.load(here + offsets, mask=offsets < size), mask=offsets < size)


@dataclass(slots=True)
class Launched:
    """A copy under way."""

    event: torch.cuda.Event
    table: torch.Tensor
    """Kept until the kernel has read it."""


def launch(table: NDArray[numpy.int64], stream: torch.cuda.Stream) -> Launched:
    """Copy piece by piece on ``stream``, whose device is the current one; rows are source, target, size in bytes."""
    parts = split(table, _ROW_BYTES)
    rows = len(parts)
    pinned = torch.empty((3, rows), dtype=torch.int64, pin_memory=True)
    pinned.numpy()[:] = parts.T
    wide = not int(numpy.bitwise_or.reduce(parts, axis=None)) % _ALIGNED
    with torch.cuda.stream(stream):
        there = pinned.to("cuda", non_blocking=True)
        if rows:
            units = -(-int(parts[:, 2].max()) // UNIT_BYTES)
            _copy_kernel[(rows, units)](there, rows, UNIT=UNIT_BYTES, WIDE=wide, BLOCK=2048, num_warps=8)
        event = torch.cuda.Event()
        event.record(stream)
    return Launched(event, there)
