"""What a member tells the router about the pages it holds: numbered messages, and all of it again on request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice

from llmserve.bus.block_hashes import pack_short, unpack_short
from llmserve.bus.messages import KvChange, KvEvents, Tier

PART_BLOCKS = 8192
"""Blocks of one message: 64 KB."""


class KvFeed:
    """Keeps what is held, and what of it has not been told yet. No I/O.

    Memory: about 100 bytes a page held. Changes between two ``flush`` that undo each other are never told.
    """

    def __init__(self, member: str, fingerprint: str, block_tokens: int, host: str, *, once: bool = False) -> None:
        """``once``: a block is held or not, however often that is said, as a file is there or not. Otherwise it is
        gone when it went as often as it came: an engine may compute one twice at a time."""
        self.seq = 0
        """Of the last message."""
        self.block_tokens = block_tokens
        """To be right before the first message."""
        self._member = member
        self._fingerprint = fingerprint
        self._host = host
        self._once = once
        self._held: dict[Tier, Counter[int]] = {}
        """How often each block is held."""
        self._before: dict[Tier, dict[int, bool]] = {}
        """Whether the router believes that a block is held, of those that changed since the last message."""

    @property
    def pending(self) -> bool:
        """Whether there is something to tell."""
        return any(self._before.values())

    def held(self, tier: Tier) -> frozenset[int]:
        """Short hashes of the blocks held in a tier."""
        return frozenset(self._held.get(tier, ()))

    def change(self, changes: Iterable[KvChange]) -> None:
        """Take changes in. Raises ``ValueError`` for cut hashes."""
        for change in changes:
            held = self._held.setdefault(change.tier, Counter())
            before = self._before.setdefault(change.tier, {})
            if change.cleared:
                for number in held:
                    before.setdefault(number, True)
                held.clear()
            for number in unpack_short(change.removed):
                if number in held:
                    before.setdefault(number, True)
                    held[number] -= 1
                    if not held[number]:
                        del held[number]
            for number in unpack_short(change.stored):
                before.setdefault(number, number in held)
                held[number] = 1 if self._once else held[number] + 1

    def flush(self) -> list[KvEvents]:
        """What to publish now; usually one message."""
        messages: list[KvEvents] = []
        for tier, before in self._before.items():
            held = self._held[tier]
            removed = [number for number, was in before.items() if was and number not in held]
            stored = [number for number, was in before.items() if not was and number in held]
            before.clear()
            for part in _parts(removed):
                messages.append(self._message(KvChange(tier, removed=part)))
            for part in _parts(stored):
                messages.append(self._message(KvChange(tier, stored=part)))
        return messages

    def snapshot(self) -> list[KvEvents]:
        """Everything that is held; the first message makes the router forget what it knew."""
        for before in self._before.values():
            before.clear()
        changes = [KvChange(tier, stored=part) for tier, held in self._held.items() for part in _parts(held)]
        first = self._message(*changes[:1], snapshot=True)
        return [first, *(self._message(change) for change in changes[1:])]

    def _message(self, *changes: KvChange, snapshot: bool = False) -> KvEvents:
        self.seq += 1
        return KvEvents(
            member=self._member,
            seq=self.seq,
            fingerprint=self._fingerprint,
            block_tokens=self.block_tokens,
            changes=list(changes),
            host=self._host,
            snapshot=snapshot,
        )


def _parts(hashes: Iterable[int]) -> Iterator[bytes]:
    numbers = iter(hashes)
    while part := list(islice(numbers, PART_BLOCKS)):
        yield pack_short(part)
