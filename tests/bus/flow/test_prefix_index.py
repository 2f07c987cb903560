"""Where pages are: the map against a naive model of it, its bound, and what a worker can load."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmserve.bus.flow.prefix_index import PrefixIndex, Reader, Run, Source
from llmserve.bus.messages import Tier


def source(member: str, tier: Tier = Tier.GPU, host: str = "", *, fingerprint: str = "f", tokens: int = 16) -> Source:
    return Source(member, tier, fingerprint, tokens, host)


def reader(member: str, host: str = "h1", *, fingerprint: str = "f", tokens: int = 16) -> Reader:
    return Reader(member, fingerprint, tokens, host)


SOURCES = [
    source("a"),
    source("a", Tier.DRAM),
    source("b"),
    source("kv1", Tier.NVME, "h1"),
    source("kv2", Tier.NVME, "h2"),
    source("kv1", Tier.S3),
]
hashes = st.lists(st.integers(0, 11), min_size=1, max_size=6)
steps = st.lists(
    st.tuples(st.sampled_from(["store", "remove", "drop"]), st.sampled_from(SOURCES), hashes), max_size=40
)


def naive(held: dict[Source, set[int]], asked: list[int], who: Reader) -> dict[Tier, int]:
    """What ``loadable`` means, one block at a time."""
    blocks: dict[Tier, int] = {}
    leading = True
    for number in asked:
        tiers = [s.tier for s, numbers in held.items() if number in numbers and who.can_load(s)]
        tiers = [tier for tier in tiers if leading or tier is not Tier.GPU]
        if not tiers:
            break
        nearest = min(tiers, key=list(Tier).index)
        leading = leading and nearest is Tier.GPU
        blocks[nearest] = blocks.get(nearest, 0) + 1
    return blocks


@given(steps, st.lists(st.integers(0, 11), max_size=12, unique=True))
def test_the_index_answers_as_a_set_of_hashes_for_each_holder_would(
    history: list[tuple[str, Source, list[int]]], asked: list[int]
) -> None:
    index, held = PrefixIndex(100), {s: set[int]() for s in SOURCES}
    for step, who, numbers in history:
        if step == "store":
            index.store(who, numbers)
            held[who] |= set(numbers)
        elif step == "remove":
            index.remove(who, numbers)
            held[who] -= set(numbers)
        else:
            index.drop(who)
            held[who].clear()
        index.check()
    runs = index.runs(asked)
    index.check()
    for worker in (reader("a"), reader("a", "h2"), reader("b"), reader("c", "h3")):
        assert index.loadable(runs, worker) == naive(held, asked, worker)


@given(steps, st.integers(1, 6))
def test_the_index_never_outgrows_its_bound(history: list[tuple[str, Source, list[int]]], bound: int) -> None:
    index = PrefixIndex(bound)
    for step, who, numbers in history:
        if step == "store":
            index.store(who, numbers)
        elif step == "remove":
            index.remove(who, numbers)
        else:
            index.drop(who)
        index.check()


def test_what_was_used_last_is_kept_and_a_prefix_loses_its_tail_first() -> None:
    index = PrefixIndex(4)
    index.store(source("a"), [1, 2, 3])
    index.store(source("a"), [9])
    index.runs([1, 2, 3])
    index.store(source("a"), [20])
    assert index.runs([9]) == ()
    index.store(source("a"), [21])
    assert index.runs([1, 2, 3]) == (Run(1, 2),)
    assert index.forgotten == 2


def test_a_worker_loads_its_own_memory_first_and_then_only_from_below() -> None:
    index = PrefixIndex(100)
    index.store(source("a"), [1, 2, 5])
    index.store(source("kv", Tier.NVME, "h1"), [2, 3, 4, 5])
    runs = index.runs([1, 2, 3, 4, 5, 6])
    assert index.loadable(runs, reader("a")) == {Tier.GPU: 2, Tier.NVME: 3}
    assert index.loadable(runs, reader("a", "h2")) == {Tier.GPU: 2}
    assert index.loadable(runs, reader("b")) == {}


@pytest.mark.parametrize(
    "other", [reader("a", fingerprint="g"), reader("a", tokens=32), reader("b"), reader("b", "h2")]
)
def test_pages_of_another_kind_or_another_engine_are_of_no_use(other: Reader) -> None:
    index = PrefixIndex(100)
    index.store(source("a"), [1])
    index.store(source("a", Tier.DRAM, "h1"), [1])
    assert index.loadable(index.runs([1]), other) == {}


def test_a_holder_that_comes_back_may_take_another_bit() -> None:
    index = PrefixIndex(100)
    for name in ("a", "b"):
        index.store(source(name), [1])
    index.drop(source("a"))
    index.store(source("c"), [2])
    index.store(source("a"), [3])
    index.check()
    assert index.loadable(index.runs([3]), reader("a")) == {Tier.GPU: 1}
    assert index.blocks_of(source("a")) == 1
    assert [s.member for s in index.sources("c")] == ["c"]
