"""Which page here takes which page of the producer."""

from __future__ import annotations

from collections.abc import Sequence

NULL_PAGE = 0
"""vLLM's placeholder for pages that a sliding window has left behind."""


def paired(
    page_tokens: Sequence[int], ours: Sequence[list[int]], theirs: Sequence[list[int]], start: int, end: int
) -> tuple[list[list[int]], list[list[int]], str]:
    """(page numbers here and there by group, why they cannot be read) for tokens ``start`` to ``end`` of a prompt.

    All arguments by group: tokens of a page, and the numbers of all pages of the prompt on both sides.
    """
    local: list[list[int]] = []
    remote: list[list[int]] = []
    refusal = ""
    for size, mine, others in zip(page_tokens, ours, theirs, strict=True):
        first, last = start // size, -(-end // size)
        here, there = mine[first:last], others[first:last]
        if len(here) != last - first or len(there) != last - first:
            refusal = f"pages {first} to {last} wanted, {len(here)} are here and {len(there)} there"
        pairs = [(h, t) for h, t in zip(here, there, strict=False) if h != NULL_PAGE]
        if any(t == NULL_PAGE for _, t in pairs):
            refusal = "the prefill worker has dropped pages of its sliding window that are needed here"
        local.append([h for h, _ in pairs])
        remote.append([t for _, t in pairs])
    return local, remote, refusal
