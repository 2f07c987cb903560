"""What a node's kv manager decides: which pages move down, go away, or are brought up. Pure; times are given.

Fed with what workers tell (``Notice``) and with listings, ``due`` says what has to be done now. Rules, in order:

- A page idle for ``evict_if_inactive_s`` goes to the next tier, where its time begins anew; from the last one it goes
  away.
- Above a tier's capacity the pages go in the order of ``HotSets``: the coldest of the space furthest above its hot
  set. Pages used within ``hot_keep_s`` stay as long as others can go, those of spaces within their hot sets anyway.
- Where ``prefetch`` is on and a page of a prefix is read, the pages that follow it are wanted one tier up.
"""

from __future__ import annotations

import enum
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from llmserve.kvstore.hotset import HotSets, Page
from llmserve.kvstore.keys import PageKey, hot_bytes, parse_path
from llmserve.kvstore.notices import Notice, NoticeKind
from llmserve.kvstore.stores.base import Stored
from llmserve.manifests.schema import Manifest

_BATCH = 256
"""Moves ordered at once."""
_AHEAD = 64
"""Pages of a prefix that are wanted at once."""
_WANTED_S = 30.0
"""For which a page that was wanted is not wanted again."""


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


class Manager:
    """The state: which pages are in which tier, who owns them, and when they were used."""

    def __init__(self, tiers: Sequence[TierRules], rules: Rules) -> None:
        self._tiers = tiers
        self._rules = rules
        self._numbers = {tier.name: number for number, tier in enumerate(tiers)}
        self._sets = [HotSets[str](tier.capacity_bytes, rules.hot_bytes) for tier in tiers]
        self._children: dict[tuple[str, str, bytes], set[str]] = {}
        """(fingerprint, space, block) -> paths of the pages that follow it."""
        self._parents: dict[str, tuple[str, str, bytes]] = {}
        self._busy: set[tuple[int, str]] = set()
        """Ordered and not done yet."""
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
                self._link(key, notice.parent)
            return not known
        self._sets[tier].touch(notice.path, now_s)
        if known and self._tiers[tier].prefetch:
            self._prefetches.extend(self._following(tier, key, now_s))
        return False

    def stored(self, tier: int, key: PageKey, size_bytes: int, used_s: float) -> None:
        """The page is in the tier now."""
        self._sets[tier].add(key.path, Page(key.space, size_bytes, used_s))

    def follows(self, path: str, parent: bytes) -> None:
        """The page follows the block ``parent`` in its prefix; of no interest if it is in no tier any more."""
        key = parse_path(path)
        if key is not None and path not in self._parents and any(path in pages for pages in self._sets):
            self._link(key, parent)

    def removed(self, tier: int, path: str) -> None:
        """The page is not in the tier any more."""
        self._sets[tier].remove(path)
        self._busy.discard((tier, path))
        if not any(path in pages for pages in self._sets):
            self._unlink(path)

    def listed(self, tier: int, found: Iterable[Stored]) -> tuple[list[str], list[str]]:
        """What the tier holds, whole: (paths that were not known, paths that are not there any more).

        Of a page that is known the later time of use counts.
        """
        pages = self._sets[tier]
        current = sorted((item for item in found if parse_path(item.path)), key=lambda item: item.used_s)
        gone = set(pages.keys()) - {item.path for item in current}
        for path in gone:
            self.removed(tier, path)
        came: list[str] = []
        renewed: list[tuple[float, Stored]] = []
        for item in current:
            known = pages.get(item.path)
            if known is None:
                came.append(item.path)
            renewed.append((max(item.used_s, known.used_s) if known else item.used_s, item))
        for used_s, item in sorted(renewed, key=lambda pair: pair[0]):
            key = parse_path(item.path)
            assert key is not None
            self.stored(tier, key, item.size_bytes, used_s)
        return came, list(gone)

    def failed(self, move: Move) -> None:
        """The order could not be carried out; it may be given again."""
        self._busy.discard((move.tier, move.path))

    # -- what is to be done -------------------------------------------------------------------------------------

    def due(self, now_s: float) -> list[Move]:
        """Orders to be carried out now; each is to be answered with ``removed``, ``stored`` or ``failed``."""
        orders = [*itertools.islice(self._evictions(now_s), _BATCH), *self._prefetches]
        self._prefetches = []
        self._busy.update((move.tier, move.path) for move in orders if move.kind is not MoveKind.PREFETCH)
        return orders

    def _evictions(self, now_s: float) -> Iterator[Move]:
        for tier, pages in enumerate(self._sets):
            leaving: set[str] = set()
            for path in self._idle(pages, now_s):
                if (tier, path) not in self._busy:
                    leaving.add(path)
                    yield self._away(tier, path)
            yield from (self._away(tier, path) for path in self._pressed(tier, leaving, now_s))

    def _idle(self, pages: HotSets[str], now_s: float) -> Iterator[str]:
        for space in pages.spaces():
            for path, page in pages.coldest_first(space):
                if now_s - page.used_s < self._rules.evict_if_inactive_s:
                    break
                yield path

    def _pressed(self, tier: int, leaving: set[str], now_s: float) -> Iterator[str]:
        pages, hot_keep_s = self._sets[tier], self._rules.hot_keep_s
        going = {path for number, path in self._busy if number == tier} | leaving
        over = pages.over_bytes - sum(page.size_bytes for path in going if (page := pages.get(path)) is not None)
        for idle_s in (hot_keep_s, 0.0):
            if over <= 0:
                return
            used_before_s = now_s - idle_s
            for path, page in pages.victims(going, used_before_s, above_hot_sets=True):
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

    # -- prefixes -----------------------------------------------------------------------------------------------

    def _link(self, key: PageKey, parent: bytes) -> None:
        place = (key.fingerprint, key.space, parent)
        self._children.setdefault(place, set()).add(key.path)
        self._parents[key.path] = place

    def _unlink(self, path: str) -> None:
        place = self._parents.pop(path, None)
        if place is not None:
            self._children[place].discard(path)
            if not self._children[place]:
                del self._children[place]

    def _following(self, tier: int, key: PageKey, now_s: float) -> Iterator[Move]:
        """Pages of the same tier that follow ``key`` in any prefix, the nearest first."""
        if len(self._wanted) > 10_000:
            self._wanted = {page: until_s for page, until_s in self._wanted.items() if until_s > now_s}
        nearest = [key]
        for _ in range(_AHEAD):
            if not nearest:
                return
            here = nearest.pop(0)
            for path in sorted(self._children.get((here.fingerprint, here.space, here.block), ())):
                child = parse_path(path)
                assert child is not None
                nearest.append(child)
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
        for path, place in self._parents.items():
            assert path in self._children[place]
            assert any(path in pages for pages in self._sets)
        assert sum(len(paths) for paths in self._children.values()) == len(self._parents)
