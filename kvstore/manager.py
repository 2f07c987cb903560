"""What a node's kv manager decides: which pages move down, go away, or are brought up. Pure; times are given.

Fed with what workers tell (``Notice``) and with listings, ``due`` says what has to be done now. Rules, in order:

- A page idle for ``evict_if_inactive_s`` goes to the next tier, where its time begins anew; from the last one it goes
  away.
- Above a tier's capacity the pages go in the order of ``HotSets``: the coldest of the space furthest above its hot
  set. Pages used within ``hot_keep_s`` stay as long as others can go, those of spaces within their hot sets anyway.
- Where ``prefetch`` is on and a page of a prefix is read, the pages that follow it are wanted one tier up.

Tiers do not wait for each other: each has its own share of the orders, and pages whose order failed are passed over
for a while, so that what cannot be moved keeps nothing else from moving.
"""

from __future__ import annotations

import enum
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from llmserve.kvstore.hotset import HotSets, Page
from llmserve.kvstore.keys import PageKey, hot_bytes, parse_path
from llmserve.kvstore.listings import Listing
from llmserve.kvstore.notices import Notice, NoticeKind
from llmserve.kvstore.prefixes import Prefixes
from llmserve.manifests.schema import Manifest

_BATCH = 256
"""Evictions of one tier that are under way at once."""
_WANTED_S = 30.0
"""For which a page that was wanted is not wanted again."""
_FIRST_PAUSE_S = 1.0
"""For which a page is left alone whose order failed; each further failure doubles it."""
_LONGEST_PAUSE_S = 60.0


@dataclass(frozen=True, slots=True)
class TierRules:
    """One storage class, as the manager treats it."""

    name: str
    capacity_bytes: float
    prefetch: bool = False


@dataclass(frozen=True, slots=True)
class Rules:
    """From ``kv_cache.eviction``."""

    hot_keep_s: float = 300.0
    evict_if_inactive_s: float = 900.0
    hot_bytes: Mapping[str, float] = field(default_factory=dict)
    """By space."""


def rules_of(manifest: Manifest) -> Rules:
    """Without ``kv_cache.eviction`` idle pages stay."""
    eviction, hot = manifest.spec.kv_cache.eviction, hot_bytes(manifest)
    if eviction is None:
        return Rules(evict_if_inactive_s=math.inf, hot_bytes=hot)
    return Rules(float(eviction.hot_keep_secs), float(eviction.evict_if_inactive_secs), hot)


class MoveKind(enum.Enum):
    """What is to be done with a page."""

    DEMOTE = "demote"
    """Copy to the next tier, then delete here."""
    DELETE = "delete"
    PREFETCH = "prefetch"
    """Bring one tier up; from the first tier into the node's page cache."""


@dataclass(frozen=True, slots=True)
class Move:
    """One page, one order."""

    kind: MoveKind
    tier: int
    """Where the page is."""
    path: str


@dataclass(frozen=True, slots=True)
class _Pause:
    """Of a page whose order failed."""

    until_s: float
    length_s: float


class Manager:
    """The state: which pages are in which tier, who owns them, and when they were used."""

    def __init__(self, tiers: Sequence[TierRules], rules: Rules) -> None:
        self._tiers = tiers
        self._rules = rules
        self._numbers = {tier.name: number for number, tier in enumerate(tiers)}
        self._sets = [HotSets[str](tier.capacity_bytes, rules.hot_bytes) for tier in tiers]
        self._prefixes = Prefixes()
        self._busy: list[set[str]] = [set() for _ in tiers]
        """Ordered and not done yet."""
        self._pauses: list[dict[str, _Pause]] = [{} for _ in tiers]
        self._listings: dict[int, Listing] = {}
        """Under way, by tier."""
        self._wanted: dict[tuple[int, str], float] = {}
        self._prefetches: list[Move] = []

    # -- what is told -------------------------------------------------------------------------------------------

    def notice(self, notice: Notice, now_s: float) -> bool:
        """Take in what a worker tells; True if a page came or went."""
        tier = self._numbers.get(notice.tier)
        key = parse_path(notice.path)
        if tier is None or key is None:
            return False
        known = notice.path in self._sets[tier]
        if notice.kind is NoticeKind.REMOVED:
            self.removed(tier, notice.path)
            return known
        if notice.kind is NoticeKind.STORED:
            self.stored(tier, key, notice.size_bytes, now_s)
            if notice.parent:
                self._prefixes.link(key, notice.parent)
            return not known
        self._sets[tier].touch(notice.path, now_s)
        if (listing := self._listings.get(tier)) is not None:
            listing.used(notice.path, now_s)
        if known and self._tiers[tier].prefetch:
            self._prefetches.extend(self._following(tier, key, now_s))
        return False

    def stored(self, tier: int, key: PageKey, size_bytes: int, used_s: float) -> None:
        """The page is in the tier now."""
        path = key.path
        self._sets[tier].add(path, Page(key.space, size_bytes, used_s))
        self._told(tier, path)

    def follows(self, path: str, parent: bytes) -> None:
        """The page follows the block ``parent`` in its prefix; of no interest if it is in no tier any more."""
        key = parse_path(path)
        if key is not None and path not in self._prefixes and any(path in pages for pages in self._sets):
            self._prefixes.link(key, parent)

    def removed(self, tier: int, path: str) -> None:
        """The page is not in the tier any more."""
        self._told(tier, path)
        self._take_out(tier, path)

    def failed(self, move: Move, now_s: float) -> None:
        """The order could not be carried out; it is given again after a pause."""
        if move.kind is MoveKind.PREFETCH:
            return
        self._busy[move.tier].discard(move.path)
        pauses = self._pauses[move.tier]
        if move.path in self._sets[move.tier]:
            before = pauses.get(move.path)
            length_s = min(2 * before.length_s, _LONGEST_PAUSE_S) if before is not None else _FIRST_PAUSE_S
            pauses[move.path] = _Pause(now_s + length_s, length_s)

    def put_back(self, move: Move) -> None:
        """The order was not even begun; it may be given again at once."""
        if move.kind is not MoveKind.PREFETCH:
            self._busy[move.tier].discard(move.path)

    def _told(self, tier: int, path: str) -> None:
        if (listing := self._listings.get(tier)) is not None:
            listing.told(path)

    def _take_out(self, tier: int, path: str) -> None:
        self._sets[tier].remove(path)
        self._busy[tier].discard(path)
        self._pauses[tier].pop(path, None)
        if not any(path in pages for pages in self._sets):
            self._prefixes.unlink(path)

    # -- what is listed -----------------------------------------------------------------------------------------

    def listing(self, tier: int, now_s: float) -> Listing:
        """A listing of the tier begins: what is told of the tier from now on counts more than what it shows."""
        begun = self._listings[tier] = Listing(tier, self._sets[tier], now_s)
        return begun

    def listed(self, listing: Listing) -> Iterator[tuple[list[PageKey], list[PageKey]]]:
        """Take in a sorted listing, slice by slice: (pages that came, pages that went).

        Of a page that is known the later time of use counts. Until the listing is ``over`` there are no orders for
        the tier: the order of its pages is not right meanwhile.
        """
        pages = self._sets[listing.tier]
        for missing in listing.missing():
            gone = [key for key in missing if key.path in pages]
            for key in gone:
                self._take_out(listing.tier, key.path)
            yield [], gone
        for found in listing.found():
            for item in found:
                listing.renew(item)
            yield [item.key for item in found if item.key is not None], []
        listing.finish()

    def over(self, listing: Listing) -> None:
        """The listing was taken in, or has failed."""
        if self._listings.get(listing.tier) is listing:
            del self._listings[listing.tier]

    # -- what is to be done -------------------------------------------------------------------------------------

    def due(self, now_s: float, rooms: Mapping[int, int] | None = None) -> list[Move]:
        """Orders to be carried out now; each is to be answered with ``removed``, ``stored``, ``failed`` or
        ``put_back``.

        ``rooms``: by tier, how many evictions may be ordered at most, where that is less than usual: a tier that
        fails is left alone, and then tried with one.
        """
        orders: list[Move] = []
        for tier, busy in enumerate(self._busy):
            room = min(_BATCH - len(busy), (rooms or {}).get(tier, _BATCH))
            listing = self._listings.get(tier)
            if room > 0 and not (listing is not None and listing.sorted):
                given = list(itertools.islice(self._evictions(tier, now_s), room))
                busy.update(move.path for move in given)
                orders.extend(given)
        orders.extend(self._prefetches)
        self._prefetches = []
        return orders

    def _evictions(self, tier: int, now_s: float) -> Iterator[Move]:
        busy, paused, leaving = self._busy[tier], self._paused(tier, now_s), set[str]()
        for path in self._idle(self._sets[tier], now_s):
            if path not in busy and path not in paused:
                leaving.add(path)
                yield self._away(tier, path)
        for path in self._pressed(tier, busy | leaving, paused, now_s):
            yield self._away(tier, path)

    def _paused(self, tier: int, now_s: float) -> frozenset[str]:
        return frozenset(path for path, pause in self._pauses[tier].items() if now_s < pause.until_s)

    def _idle(self, pages: HotSets[str], now_s: float) -> Iterator[str]:
        for space in pages.spaces():
            for path, page in pages.coldest_first(space):
                if now_s - page.used_s < self._rules.evict_if_inactive_s:
                    break
                yield path

    def _pressed(self, tier: int, going: set[str], paused: frozenset[str], now_s: float) -> Iterator[str]:
        pages, hot_keep_s = self._sets[tier], self._rules.hot_keep_s
        over = pages.over_bytes - sum(page.size_bytes for path in going if (page := pages.get(path)) is not None)
        for idle_s in (hot_keep_s, 0.0):
            if over <= 0:
                return
            used_before_s = now_s - idle_s
            allowed = pages.victims(going, used_before_s, above_hot_sets=True, may_go=lambda path: path not in paused)
            for path, page in allowed:
                going.add(path)
                over -= page.size_bytes
                yield path
                if over <= 0:
                    return

    def _away(self, tier: int, path: str) -> Move:
        below = tier + 1
        if below == len(self._tiers) or path in self._sets[below]:
            return Move(MoveKind.DELETE, tier, path)
        return Move(MoveKind.DEMOTE, tier, path)

    def _following(self, tier: int, key: PageKey, now_s: float) -> Iterator[Move]:
        """Pages of the same tier that follow ``key`` in any prefix, the nearest first."""
        if len(self._wanted) > 10_000:
            self._wanted = {page: until_s for page, until_s in self._wanted.items() if until_s > now_s}
        for path in self._prefixes.following(key):
            above = tier and path in self._sets[tier - 1]
            if path in self._sets[tier] and not above and self._wanted.get((tier, path), 0.0) <= now_s:
                self._wanted[tier, path] = now_s + _WANTED_S
                yield Move(MoveKind.PREFETCH, tier, path)

    # -- what is there ------------------------------------------------------------------------------------------

    def pages(self, tier: int) -> HotSets[str]:
        return self._sets[tier]

    def check(self) -> None:
        """Assert the invariants."""
        for pages in self._sets:
            pages.check()
        self._prefixes.check()
        assert all(any(path in pages for pages in self._sets) for path in self._prefixes)
