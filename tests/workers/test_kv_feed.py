"""What a member tells about its pages reaches the router's index, however much is lost on the way."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmserve.bus.block_hashes import SHORT_BYTES, pack_short
from llmserve.bus.flow.locality import Locality
from llmserve.bus.flow.prefix_index import Source
from llmserve.bus.messages import Heartbeat, KvChange, KvEvents, Role, Tier, decode, encode
from llmserve.workers import kv_feed
from llmserve.workers.kv_feed import KvFeed

numbers = st.lists(st.integers(0, 15), max_size=5).map(pack_short)
changes = st.builds(KvChange, st.sampled_from([Tier.GPU, Tier.DRAM]), numbers, numbers, st.booleans())


def beat(feed: KvFeed) -> Heartbeat:
    return Heartbeat(member="w", role=Role.PREFILL, host="h", pid=1, kv_seq=feed.seq)


def known(locality: Locality, feed: KvFeed) -> bool:
    """Whether the index holds exactly what the member does."""
    for tier in (Tier.GPU, Tier.DRAM):
        source = Source("w", tier, "f", 16, "h")
        held = feed.held(tier)
        if locality.index.blocks_of(source) != len(held):
            return False
        bit = [run.mask for number in held for run in locality.index.runs([number])]
        if len(bit) != len(held):
            return False
    locality.index.check()
    return True


def heard(locality: Locality, messages: list[KvEvents], now_s: float) -> None:
    for message in messages:
        again = decode(encode(message))
        assert isinstance(again, KvEvents)
        locality.hear(again, now_s)


@given(st.lists(changes, max_size=30), st.integers(0, 2**32))
def test_the_index_follows_a_member_and_notices_what_it_missed(history: list[KvChange], seed: int) -> None:
    rng = random.Random(seed)
    locality, feed, now_s = Locality(1000), KvFeed("w", "f", 16, "h"), 0.0
    missed = 0
    for change in history:
        now_s += 0.1
        feed.change([change])
        if rng.random() < 0.6:
            messages = feed.flush()
            lost = messages and rng.random() < 0.3
            missed += len(messages) if lost else 0
            heard(locality, [] if lost else messages, now_s)
        if rng.random() < 0.3:
            locality.beat(beat(feed), now_s)
        if locality.due(now_s):
            heard(locality, feed.snapshot(), now_s)
    heard(locality, feed.flush(), now_s)
    locality.beat(beat(feed), now_s)
    now_s += 5.0
    if locality.due(now_s):
        heard(locality, feed.snapshot(), now_s)
    assert locality.due(now_s + 5.0) == []
    assert known(locality, feed)
    assert locality.stats.lost <= missed


def test_changes_that_undo_each_other_are_never_told() -> None:
    feed = KvFeed("w", "f", 16, "h")
    feed.change([KvChange(Tier.GPU, stored=pack_short([1, 2]))])
    feed.change([KvChange(Tier.GPU, removed=pack_short([1]))])
    (message,) = feed.flush()
    assert message.changes == [KvChange(Tier.GPU, stored=pack_short([2]))]
    feed.change([KvChange(Tier.GPU, cleared=True), KvChange(Tier.GPU, stored=pack_short([2]))])
    assert feed.flush() == []
    assert feed.seq == 1


def test_a_block_that_is_held_twice_is_gone_when_both_are() -> None:
    feed = KvFeed("w", "f", 16, "h")
    feed.change([KvChange(Tier.GPU, stored=pack_short([1])), KvChange(Tier.GPU, stored=pack_short([1]))])
    feed.flush()
    feed.change([KvChange(Tier.GPU, removed=pack_short([1]))])
    assert feed.flush() == []
    feed.change([KvChange(Tier.GPU, removed=pack_short([1]))])
    assert [message.changes[0].removed for message in feed.flush()] == [pack_short([1])]


def test_a_large_snapshot_comes_in_parts_that_replace_what_was_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_feed, "PART_BLOCKS", 10)
    locality, feed = Locality(1000), KvFeed("w", "f", 16, "h")
    feed.change([KvChange(Tier.GPU, stored=pack_short(range(25)))])
    heard(locality, feed.flush(), 0.0)
    feed.change([KvChange(Tier.GPU, cleared=True), KvChange(Tier.DRAM, stored=pack_short(range(100, 130)))])
    messages = feed.snapshot()
    assert [message.snapshot for message in messages] == [True, False, False]
    assert all(len(change.stored) <= 10 * SHORT_BYTES for message in messages for change in message.changes)
    heard(locality, messages, 1.0)
    assert known(locality, feed)


def test_an_empty_snapshot_is_told_too() -> None:
    locality, feed = Locality(1000), KvFeed("w", "f", 16, "h")
    feed.change([KvChange(Tier.GPU, stored=pack_short([1]))])
    heard(locality, feed.flush(), 0.0)
    feed.change([KvChange(Tier.GPU, cleared=True)])
    heard(locality, feed.snapshot(), 1.0)
    assert len(locality.index) == 0
