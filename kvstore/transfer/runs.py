"""Lists of runs as arrays, cut into pieces of bounded size."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, overload

from llmserve.kvstore.transfer.base import Region, Run, TransferError

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

Spans = Sequence[tuple[int, int]]
"""Address and size in bytes of each piece, in order."""


class RunTable(Sequence[Run]):
    """Many runs as one array of shape (runs, 3): local address, remote address, size in bytes."""

    def __init__(self, array: NDArray[numpy.int64]) -> None:
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    @overload
    def __getitem__(self, at: int) -> Run: ...
    @overload
    def __getitem__(self, at: slice) -> RunTable: ...
    def __getitem__(self, at: int | slice) -> Run | RunTable:
        if isinstance(at, slice):
            return RunTable(self.array[at])
        return Run(*self.array[at].tolist())

    @property
    def size_bytes(self) -> int:
        return int(self.array[:, 2].sum())


def size_of(runs: Sequence[Run]) -> int:
    """Bytes of all runs."""
    return runs.size_bytes if isinstance(runs, RunTable) else sum(run.size_bytes for run in runs)


def local_pieces(table: NDArray[numpy.int64]) -> NDArray[numpy.uint64]:
    """Shape (runs, 2): address and size, as ``struct iovec``."""
    import numpy

    return numpy.ascontiguousarray(table[:, [0, 2]], dtype=numpy.uint64)


def remote_pieces(table: NDArray[numpy.int64]) -> NDArray[numpy.uint64]:
    """Shape (runs, 2): address and size, as ``struct iovec``."""
    import numpy

    return numpy.ascontiguousarray(table[:, [1, 2]], dtype=numpy.uint64)


def total_bytes(spans: Spans) -> int:
    return sum(size for _, size in spans)


def local_spans(runs: Sequence[Run]) -> list[tuple[int, int]]:
    if isinstance(runs, RunTable):
        return list(zip(runs.array[:, 0].tolist(), runs.array[:, 2].tolist(), strict=True))
    return [(run.local, run.size_bytes) for run in runs]


def remote_spans(runs: Sequence[Run]) -> list[tuple[int, int]]:
    if isinstance(runs, RunTable):
        return list(zip(runs.array[:, 1].tolist(), runs.array[:, 2].tolist(), strict=True))
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


def split(table: NDArray[numpy.int64], limit_bytes: int) -> NDArray[numpy.int64]:
    """A ``RunTable.array`` whose runs are cut to at most ``limit_bytes``."""
    import numpy

    counts = -(-table[:, 2] // limit_bytes)
    if not len(table) or int(counts.max()) <= 1:
        return table
    parts = numpy.repeat(table, counts, axis=0)
    first = numpy.repeat(numpy.cumsum(counts) - counts, counts)
    offsets = (numpy.arange(len(parts)) - first) * limit_bytes
    parts[:, 2] = numpy.minimum(parts[:, 2] - offsets, limit_bytes)
    parts[:, :2] += offsets[:, None]
    return parts


def chunks(table: NDArray[numpy.int64], chunk_bytes: int) -> list[NDArray[numpy.int64]]:
    """The runs, in order, in groups of about ``chunk_bytes``."""
    import numpy

    parts = split(table, chunk_bytes)
    group = (numpy.cumsum(parts[:, 2]) - 1) // chunk_bytes
    return numpy.split(parts, numpy.flatnonzero(numpy.diff(group)) + 1)


def table_of(runs: Sequence[Run]) -> NDArray[numpy.int64]:
    """Shape (runs, 3), see ``RunTable``."""
    import numpy

    if isinstance(runs, RunTable):
        return runs.array
    rows = [(run.local, run.remote, run.size_bytes) for run in runs]
    return numpy.array(rows, dtype=numpy.int64).reshape(-1, 3)


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
