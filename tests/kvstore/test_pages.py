"""Coalescing of pages into runs of bytes."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmserve.kvstore.transfer.pages import Strip, byte_runs, page_runs

pairs = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=60)


@given(pairs)
def test_runs_expand_to_exactly_the_pairs_they_were_made_of(pages: list[tuple[int, int]]) -> None:
    runs = page_runs([h for h, _ in pages], [t for _, t in pages])
    assert [(here + i, there + i) for here, there, count in runs.tolist() for i in range(count)] == pages


@given(pairs)
def test_no_two_neighbouring_runs_could_be_merged(pages: list[tuple[int, int]]) -> None:
    runs = page_runs([h for h, _ in pages], [t for _, t in pages])
    for (here, there, count), after in itertools.pairwise(runs.tolist()):
        assert [here + count, there + count] != after[:2]


@given(pairs, st.booleans(), st.booleans(), st.integers(1, 4))
def test_byte_runs_copy_each_page_of_each_layer(
    pages: list[tuple[int, int]], gap_here: bool, gap_there: bool, layers: int
) -> None:
    size = 16

    def strips(base: int, gap: bool) -> list[Strip]:
        return [Strip(base + layer * 10_000, size + 8 * gap, size) for layer in range(layers)]

    here, there = strips(1_000_000, gap_here), strips(2_000_000, gap_there)
    runs = byte_runs(page_runs([h for h, _ in pages], [t for _, t in pages]), here, there)
    copied = [(r.local + i, r.remote + i) for r in runs for i in range(r.size_bytes)]
    wanted = [
        (a.base + h * a.stride_bytes + i, b.base + t * b.stride_bytes + i)
        for a, b in zip(here, there, strict=True)
        for h, t in pages
        for i in range(size)
    ]
    assert copied == wanted


def test_touching_pages_move_in_one_run() -> None:
    strip = Strip(0, 64, 64)
    runs = list(byte_runs(page_runs([3, 4, 5, 9], [10, 11, 12, 13]), [strip], [strip]))
    assert [(r.local, r.remote, r.size_bytes) for r in runs] == [(192, 640, 192), (576, 832, 64)]


def test_different_numbers_of_pages_are_refused() -> None:
    with pytest.raises(ValueError, match="2 local pages for 1"):
        page_runs([1, 2], [1])


def test_pages_of_different_size_are_refused() -> None:
    with pytest.raises(ValueError, match="64 bytes here and 32 there"):
        list(byte_runs(page_runs([1], [1]), [Strip(0, 64, 64)], [Strip(0, 32, 32)]))


def test_different_numbers_of_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="1 local layers for 2"):
        list(byte_runs(page_runs([1], [1]), [Strip(0, 64, 64)], [Strip(0, 64, 64)] * 2))
