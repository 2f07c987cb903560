"""What the kv role tells the router: pages of several kinds, some of which only this host can read. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from llmserve.bus.block_hashes import SHORT_BYTES
from llmserve.bus.messages import KvChange, KvEvents, Tier
from llmserve.kvstore.keys import PageKey
from llmserve.workers.kv_feed import KvFeed


class Feeds:
    """One member's numbered messages over a ``KvFeed`` for each kind of pages and reach."""

    def __init__(self, member: str, host: str) -> None:
        self.member = member
        self.seq = 0
        self._host = host
        self._tokens: dict[str, int] = {}
        """Tokens of a page by fingerprint, from the heartbeats of the engines that have such pages."""
        self._feeds: dict[tuple[str, bool], KvFeed] = {}
        """By fingerprint, and whether only this host can read the pages. Those of fingerprints that no engine here
        has had yet are told when one comes."""

    def learn(self, fingerprint: str, page_tokens: int) -> None:
        """An engine with such pages is there."""
        if fingerprint in self._tokens:
            return
        self._tokens[fingerprint] = page_tokens
        for here in (True, False):
            if (feed := self._feeds.get((fingerprint, here))) is not None:
                feed.block_tokens = page_tokens

    def change(self, tier: Tier, keys: Iterable[PageKey], *, came: bool) -> None:
        """Pages came or went; those that were there, or were not, already do not count. Of models with several groups
        of layers the first stands for all."""
        shorts: dict[str, list[bytes]] = {}
        for key in keys:
            if not key.group:
                shorts.setdefault(key.fingerprint, []).append(key.block[-SHORT_BYTES:])
        for fingerprint, some in shorts.items():
            packed = b"".join(some)
            change = KvChange(tier, stored=packed) if came else KvChange(tier, removed=packed)
            self._feed(fingerprint, tier).change([change])

    def _feed(self, fingerprint: str, tier: Tier) -> KvFeed:
        here = tier is Tier.NVME
        feed = self._feeds.get((fingerprint, here))
        if feed is None:
            tokens, host = self._tokens.get(fingerprint, 0), self._host if here else ""
            # A page is in a tier or not: what a worker tells, a listing shows and a move brings is one page.
            feed = KvFeed(self.member, fingerprint, tokens, host, once=True)
            self._feeds[fingerprint, here] = feed
        return feed

    def flush(self) -> list[KvEvents]:
        """What to publish now."""
        return self._numbered(message for feed in self._told() for message in feed.flush())

    def snapshot(self) -> list[KvEvents]:
        """Everything; the first message makes the router forget what it knew."""
        whole = [message for feed in self._told() for message in feed.snapshot()]
        return self._numbered(
            msgspec.structs.replace(message, snapshot=number == 0) for number, message in enumerate(whole)
        )

    def _told(self) -> Iterator[KvFeed]:
        return (feed for (fingerprint, _), feed in self._feeds.items() if fingerprint in self._tokens)

    def _numbered(self, messages: Iterable[KvEvents]) -> list[KvEvents]:
        numbered: list[KvEvents] = []
        for message in messages:
            self.seq += 1
            numbered.append(msgspec.structs.replace(message, seq=self.seq))
        return numbered
