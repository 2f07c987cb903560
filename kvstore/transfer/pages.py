"""From pairs of pages to as few runs of bytes as possible."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llmserve.kvstore.transfer.base import Run


@dataclass(frozen=True, slots=True)
class PageRun:
    """``count`` pages, consecutive on both sides."""

    local: int
    remote: int
    count: int


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


def page_runs(local: Sequence[int], remote: Sequence[int]) -> list[PageRun]:
    """Pair the i-th local page with the i-th remote one and merge neighbours. Raises ``ValueError``."""
    if len(local) != len(remote):
        raise ValueError(f"{len(local)} local pages for {len(remote)} remote ones")
    runs: list[PageRun] = []
    for here, there in zip(local, remote, strict=True):
        last = runs[-1] if runs else None
        if last and here == last.local + last.count and there == last.remote + last.count:
            runs[-1] = PageRun(last.local, last.remote, last.count + 1)
        else:
            runs.append(PageRun(here, there, 1))
    return runs


def byte_runs(runs: Sequence[PageRun], local: Sequence[Strip], remote: Sequence[Strip]) -> Iterator[Run]:
    """The runs' bytes, strip by strip; pages that do not touch on both sides go one by one.

    Raises ``ValueError`` if the strips do not match.
    """
    if len(local) != len(remote):
        raise ValueError(f"{len(local)} local layers for {len(remote)} remote ones")
    for here, there in zip(local, remote, strict=True):
        if here.page_bytes != there.page_bytes:
            raise ValueError(f"a page of a layer is {here.page_bytes} bytes here and {there.page_bytes} there")
        merge = here.dense and there.dense
        for run in runs:
            for first, count in [(0, run.count)] if merge else [(i, 1) for i in range(run.count)]:
                yield Run(
                    here.base + (run.local + first) * here.stride_bytes,
                    there.base + (run.remote + first) * there.stride_bytes,
                    count * here.page_bytes,
                )
