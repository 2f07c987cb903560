"""From pairs of pages to as few runs of bytes as possible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmserve.kvstore.transfer.runs import RunTable

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Strip:
    """One layer's pages in memory: page ``i`` is ``page_bytes`` long and starts at ``base + i * stride_bytes``."""

    base: int
    stride_bytes: int
    page_bytes: int

    @property
    def dense(self) -> bool:
        """Whether consecutive pages touch."""
        return self.stride_bytes == self.page_bytes


def page_runs(local: Sequence[int], remote: Sequence[int]) -> NDArray[numpy.int64]:
    """Pair the i-th local page with the i-th remote one and merge neighbours. Raises ``ValueError``.

    Shape (runs, 3): first page here, first page there, and how many are consecutive on both sides.
    """
    import numpy

    if len(local) != len(remote):
        raise ValueError(f"{len(local)} local pages for {len(remote)} remote ones")
    pairs = numpy.array([local, remote], dtype=numpy.int64)
    first = numpy.flatnonzero((numpy.diff(pairs, prepend=-2) != 1).any(axis=0))
    counts = numpy.diff(first, append=len(local))
    return numpy.stack([*pairs[:, first], counts], axis=1)


def byte_runs(runs: NDArray[numpy.int64], local: Sequence[Strip], remote: Sequence[Strip]) -> RunTable:
    """The runs' bytes, strip by strip; pages that do not touch on both sides go one by one.

    Raises ``ValueError`` if the strips do not match.
    """
    import numpy

    if len(local) != len(remote):
        raise ValueError(f"{len(local)} local layers for {len(remote)} remote ones")
    tables: list[NDArray[numpy.int64]] = [numpy.empty((0, 3), dtype=numpy.int64)]
    for here, there in zip(local, remote, strict=True):
        if here.page_bytes != there.page_bytes:
            raise ValueError(f"a page of a layer is {here.page_bytes} bytes here and {there.page_bytes} there")
        pages = runs if here.dense and there.dense else _singly(runs)
        scale = numpy.array([here.stride_bytes, there.stride_bytes, here.page_bytes], dtype=numpy.int64)
        tables.append(pages * scale + numpy.array([here.base, there.base, 0], dtype=numpy.int64))
    return RunTable(numpy.concatenate(tables))


def _singly(runs: NDArray[numpy.int64]) -> NDArray[numpy.int64]:
    """Page by page."""
    import numpy

    counts = runs[:, 2]
    first = numpy.repeat(numpy.cumsum(counts) - counts, counts)
    offsets = numpy.arange(int(counts.sum())) - first
    single = numpy.repeat(runs, counts, axis=0)
    single[:, :2] += offsets[:, None]
    single[:, 2] = 1
    return single
