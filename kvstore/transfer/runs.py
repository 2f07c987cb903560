"""Lists of runs as arrays, cut into pieces of bounded size."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from llmserve.kvstore.transfer.base import Region, Run, TransferError

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

Spans = Sequence[tuple[int, int]]
"""Address and size in bytes of each piece, in order."""


def total_bytes(spans: Spans) -> int:
    return sum(size for _, size in spans)


def local_spans(runs: Sequence[Run]) -> list[tuple[int, int]]:
    return [(run.local, run.size_bytes) for run in runs]


def remote_spans(runs: Sequence[Run]) -> list[tuple[int, int]]:
    return [(run.remote, run.size_bytes) for run in runs]


def as_array(spans: Spans) -> NDArray[numpy.uint64]:
    """Shape (pieces, 2)."""
    import numpy

    return numpy.array(spans, dtype=numpy.uint64).reshape(-1, 2)


def cut(spans: Spans, chunk_bytes: int) -> Iterator[list[tuple[int, int]]]:
    """The stream of all pieces' bytes in chunks of ``chunk_bytes``, the last one shorter.

    Two lists of the same sizes are cut at the same places.
    """
    chunk: list[tuple[int, int]] = []
    room = chunk_bytes
    for address, size in spans:
        while size:
            part = min(size, room)
            chunk.append((address, part))
            address, size, room = address + part, size - part, room - part
            if not room:
                yield chunk
                chunk, room = [], chunk_bytes
    if chunk:
        yield chunk


def check_inside(pieces: NDArray[numpy.uint64], regions: Sequence[Region]) -> None:
    """Raises ``TransferError`` unless every piece, see ``as_array``, lies in registered memory."""
    import numpy

    known = sorted((r.address, r.address + r.size_bytes) for r in regions) or [(0, 0)]
    starts, ends = numpy.array(known, dtype=numpy.uint64).T
    at = numpy.searchsorted(starts, pieces[:, 0], side="right").astype(numpy.int64) - 1
    inside = (at >= 0) & (pieces[:, 1] <= ends[at] - pieces[:, 0]) & (pieces[:, 0] <= ends[at])
    if not inside.all():
        address, size = pieces[~inside][0].tolist()
        raise TransferError(f"{size} bytes at {address:#x} are not registered")


def host_bytes(spans: Spans) -> bytes:
    """What lies at the pieces, which must be memory of this process."""
    return b"".join(ctypes.string_at(address, size) for address, size in spans)


def scatter_bytes(data: bytes, spans: Spans) -> None:
    """The reverse of ``host_bytes``."""
    at = 0
    for address, size in spans:
        ctypes.memmove(address, data[at : at + size], size)
        at += size
