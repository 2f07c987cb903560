"""Listings that are taken in slice by slice, while pages come, go and are used."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve.kvstore import listings
from llmserve.kvstore.keys import PageKey
from llmserve.kvstore.manager import Manager, Rules, TierRules
from llmserve.kvstore.notices import Notice, NoticeKind
from llmserve.kvstore.stores.base import Stored

SIZE = 10


def key(number: int) -> PageKey:
    return PageKey("f00d" * 4, f"t-{'ab'[number % 2]}", number.to_bytes(32, "big"))


def made(capacity: float = 1e9) -> Manager:
    return Manager([TierRules("disk", capacity)], Rules(hot_keep_s=0.0, evict_if_inactive_s=1e9))


def tell(manager: Manager, kind: NoticeKind, number: int, now_s: float) -> None:
    manager.notice(Notice(kind, "disk", key(number).path, SIZE), now_s)


def held(manager: Manager) -> set[str]:
    return set(manager.pages(0).keys())


def paths(*numbers: int) -> set[str]:
    return {key(number).path for number in numbers}


@pytest.fixture(autouse=True)
def one_page_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listings, "SLICE_PAGES", 1)
    monkeypatch.setattr(listings, "_SORT_PAGES", 2)


def begun(manager: Manager, numbers: list[int], now_s: float = 100.0) -> listings.Listing:
    """A listing that has shown these pages, each used at the time that is its number."""
    listing = manager.listing(0, now_s)
    listing.add(Stored(key(number).path, SIZE, float(number)) for number in numbers)
    return listing


def test_a_page_stored_since_the_listing_began_stays_though_the_listing_lacks_it() -> None:
    manager = made()
    listing = begun(manager, [1])
    tell(manager, NoticeKind.STORED, 2, 101.0)
    listing.sort()
    changes = [change for change in manager.listed(listing) if any(change)]
    assert changes == [([key(1)], [])]
    assert held(manager) == paths(1, 2)


def test_a_page_removed_since_the_listing_began_does_not_come_back() -> None:
    manager = made()
    tell(manager, NoticeKind.STORED, 1, 50.0)
    listing = begun(manager, [1, 2])
    tell(manager, NoticeKind.REMOVED, 1, 101.0)
    listing.sort()
    assert [change for change in manager.listed(listing) if any(change)] == [([key(2)], [])]
    assert held(manager) == paths(2)


def test_a_page_removed_between_two_slices_does_not_come_back() -> None:
    manager = made()
    listing = begun(manager, [1, 2, 3])
    listing.sort()
    slices = manager.listed(listing)
    next(slices)
    tell(manager, NoticeKind.REMOVED, 3, 101.0)
    tell(manager, NoticeKind.REMOVED, 1, 101.0)
    list(slices)
    assert held(manager) == paths(2)


def test_while_a_listing_is_taken_in_its_tier_gets_no_orders() -> None:
    manager = made(capacity=0.0)
    listing = begun(manager, [1, 2])
    listing.sort()
    slices = manager.listed(listing)
    next(slices)
    assert manager.due(101.0) == []
    list(slices)
    manager.over(listing)
    assert {move.path for move in manager.due(101.0)} == paths(1, 2)


def test_a_tier_whose_listing_has_only_begun_is_kept_in_order() -> None:
    manager = made(capacity=0.0)
    tell(manager, NoticeKind.STORED, 1, 50.0)
    begun(manager, [1])
    assert [move.path for move in manager.due(101.0)] == [key(1).path]


def test_a_listing_that_failed_leaves_everything_as_it_was() -> None:
    manager = made(capacity=0.0)
    tell(manager, NoticeKind.STORED, 1, 50.0)
    listing = begun(manager, [])
    manager.over(listing)
    assert held(manager) == paths(1)
    assert manager.due(101.0)


def steps(manager: Manager, listing: listings.Listing) -> Iterator[None]:
    """The listing, with places where others may come between."""
    yield
    listing.sort()
    yield
    for _ in manager.listed(listing):
        yield
    manager.over(listing)


events = st.lists(st.tuples(st.sampled_from(list(NoticeKind)), st.integers(0, 9)), max_size=3)
numbers = st.lists(st.integers(0, 9), unique=True)


@given(before=st.lists(events, max_size=3), shown=numbers, between=st.lists(events, max_size=25))
@settings(max_examples=200, deadline=None)
def test_whatever_comes_between_the_last_word_counts_and_pages_stand_in_the_order_of_their_use(
    before: list[list[tuple[NoticeKind, int]]],
    shown: list[int],
    between: list[list[tuple[NoticeKind, int]]],
) -> None:
    manager, now_s = made(), 50.0
    for kind, number in [event for some in before for event in some]:
        now_s += 1
        tell(manager, kind, number, now_s)
    told: dict[int, bool] = {}
    now_s = 100.0
    listing = begun(manager, shown, now_s)
    waiting = iter(between)
    for _ in steps(manager, listing):
        for kind, number in next(waiting, []):
            now_s += 1
            tell(manager, kind, number, now_s)
            if kind is not NoticeKind.USED:
                told[number] = kind is NoticeKind.STORED
    wanted = set(shown) - {n for n, there in told.items() if not there} | {n for n, there in told.items() if there}
    assert held(manager) == paths(*wanted)
    for space in manager.pages(0).spaces():
        used = [page.used_s for _, page in manager.pages(0).coldest_first(space)]
        assert used == sorted(used)
    manager.check()
