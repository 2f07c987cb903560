"""What the kv role tells the router: pages of several kinds, some of which only this host can read. No I/O."""

from __future__ import annotations

from collections.abc import Iterable

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
        self._untold: dict[str, list[tuple[Tier, PageKey, bool]]] = {}
        """Of fingerprints that no engine here has had yet."""

    def learn(self, fingerprint: str, page_tokens: int) -> None:
        """An engine with such pages is there."""
        if fingerprint not in self._tokens:
            self._tokens[fingerprint] = page_tokens
            for tier, key, came in self._untold.pop(fingerprint, ()):
                self.change(tier, key, came=came)

    def change(self, tier: Tier, key: PageKey, *, came: bool) -> None:
        """A page came or went. Of models with several groups of layers the first stands for all."""
        if key.group:
            return
        tokens = self._tokens.get(key.fingerprint)
        if tokens is None:
            self._untold.setdefault(key.fingerprint, []).append((tier, key, came))
            return
        here = tier is Tier.NVME
        feed = self._feeds.get((key.fingerprint, here))
        if feed is None:
            feed = KvFeed(self.member, key.fingerprint, tokens, self._host if here else "")
            self._feeds[key.fingerprint, here] = feed
        short = key.block[-SHORT_BYTES:]
        feed.change([KvChange(tier, stored=short) if came else KvChange(tier, removed=short)])

    def flush(self) -> list[KvEvents]:
        """What to publish now."""
        return self._numbered(message for feed in self._feeds.values() for message in feed.flush())

    def snapshot(self) -> list[KvEvents]:
        """Everything; the first message makes the router forget what it knew."""
        whole = [message for feed in self._feeds.values() for message in feed.snapshot()]
        return self._numbered(
            msgspec.structs.replace(message, snapshot=number == 0) for number, message in enumerate(whole)
        )

    def _numbered(self, messages: Iterable[KvEvents]) -> list[KvEvents]:
        numbered: list[KvEvents] = []
        for message in messages:
            self.seq += 1
            numbered.append(msgspec.structs.replace(message, seq=self.seq))
        return numbered
