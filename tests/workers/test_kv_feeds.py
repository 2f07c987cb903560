"""What the kv role tells of pages that are there or not, however often it learns it."""

from __future__ import annotations

import pytest

from llmserve.bus.block_hashes import SHORT_BYTES
from llmserve.bus.messages import KvEvents, Tier
from llmserve.kvstore.keys import PageKey
from llmserve.workers.kv_feeds import Feeds

KIND = "f00d" * 4


def key(number: int, group: int = 0) -> PageKey:
    return PageKey(KIND, "t-a", number.to_bytes(32, "big"), group)


def hashes(messages: list[KvEvents]) -> tuple[bytes, bytes]:
    """(came, went)."""
    changes = [change for message in messages for change in message.changes]
    return b"".join(change.stored for change in changes), b"".join(change.removed for change in changes)


@pytest.fixture
def feeds() -> Feeds:
    made = Feeds("kv", "host")
    made.learn(KIND, 16)
    return made


def test_a_page_that_came_twice_is_gone_when_it_goes_once(feeds: Feeds) -> None:
    feeds.change(Tier.NVME, [key(1)], came=True)
    feeds.change(Tier.NVME, [key(1), key(1)], came=True)
    assert hashes(feeds.flush()) == (key(1).block[-SHORT_BYTES:], b"")
    feeds.change(Tier.NVME, [key(1)], came=False)
    assert hashes(feeds.flush()) == (b"", key(1).block[-SHORT_BYTES:])


def test_a_page_that_went_twice_is_there_when_it_comes_once(feeds: Feeds) -> None:
    feeds.change(Tier.S3, [key(1)], came=True)
    for came in (False, False, True):
        feeds.change(Tier.S3, [key(1)], came=came)
    assert hashes(feeds.flush()) == (key(1).block[-SHORT_BYTES:], b"")


def test_what_came_and_went_before_an_engine_could_read_it_is_never_told() -> None:
    feeds = Feeds("kv", "host")
    feeds.change(Tier.NVME, [key(1), key(2), key(3, group=1)], came=True)
    feeds.change(Tier.NVME, [key(1)], came=False)
    assert feeds.flush() == []
    assert feeds.snapshot() == []
    feeds.learn(KIND, 32)
    (message,) = feeds.flush()
    assert hashes([message]) == (key(2).block[-SHORT_BYTES:], b"")
    assert (message.seq, message.block_tokens, message.host) == (1, 32, "host")
