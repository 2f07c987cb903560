"""Which pages are where: a map from short block hashes to their holders, bounded, without I/O.

A chain of block hashes names a whole prefix, so that a flat map does what a radix tree would: a prefix is known as
far as its hashes are in the map one after the other. A holder is one tier of one member; each has a bit, and the map
keeps a mask for each hash. A look-up compresses a prompt's masks into runs of equal ones, of which there are few, so
that asking for every worker costs no more than asking once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from llmserve.bus.messages import Tier

PRIVATE_TIERS = frozenset({Tier.GPU, Tier.DRAM})
"""Only the engine that holds them can load their pages."""


@dataclass(frozen=True, slots=True)
class Source:
    """Who holds pages, and who can load them."""

    member: str
    tier: Tier
    fingerprint: str
    block_tokens: int
    host: str = ""
    """The only host whose workers can load them; empty: all can."""


@dataclass(frozen=True, slots=True)
class Reader:
    """A worker, as far as it decides what it can load."""

    member: str
    fingerprint: str
    block_tokens: int
    host: str

    def can_load(self, source: Source) -> bool:
        if source.fingerprint != self.fingerprint or source.block_tokens != self.block_tokens:
            return False
        if source.tier in PRIVATE_TIERS:
            return source.member == self.member
        return source.host in ("", self.host)


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring blocks of a prompt that the same holders have."""

    mask: int
    blocks: int


@dataclass(slots=True)
class _Holder:
    bit: int
    hashes: set[int] = field(default_factory=set)


class PrefixIndex:
    """At most ``max_blocks`` hashes; beyond them the ones that nobody stored or looked up for longest are forgotten.

    Memory: about 250 bytes a hash with one holder, 70 for each further one.
    """

    def __init__(self, max_blocks: int) -> None:
        self.max_blocks = max_blocks
        self.version = 0
        """Changes whenever a look-up could turn out otherwise."""
        self.forgotten = 0
        """Hashes dropped for want of room."""
        self._masks: dict[int, int] = {}
        """In the order of their last use, the oldest first."""
        self._holders: dict[Source, _Holder] = {}
        self._free_bits: list[int] = []
        self._access: dict[Reader, list[tuple[Tier, int]]] = {}

    def __len__(self) -> int:
        return len(self._masks)

    def blocks_of(self, source: Source) -> int:
        holder = self._holders.get(source)
        return len(holder.hashes) if holder is not None else 0

    def sizes(self) -> dict[Tier, int]:
        """Blocks by tier, each counted once for every holder."""
        sizes: dict[Tier, int] = {}
        for source, holder in self._holders.items():
            sizes[source.tier] = sizes.get(source.tier, 0) + len(holder.hashes)
        return sizes

    def sources(self, member: str) -> list[Source]:
        """All that is known to be held by ``member``."""
        return [source for source in self._holders if source.member == member]

    # -- what changes ---------------------------------------------------------------------------------------------

    def store(self, source: Source, hashes: Iterable[int]) -> None:
        """``source`` holds these."""
        holder = self._holders.get(source) or self._add_holder(source)
        masks, bit = self._masks, 1 << holder.bit
        for number in hashes:
            masks[number] = masks.pop(number, 0) | bit
            holder.hashes.add(number)
        self.version += 1
        while len(masks) > self.max_blocks:
            self._forget(next(iter(masks)))

    def remove(self, source: Source, hashes: Iterable[int]) -> None:
        """``source`` holds these no more; unknown ones are ignored."""
        holder = self._holders.get(source)
        if holder is None:
            return
        for number in hashes:
            if number in holder.hashes:
                holder.hashes.remove(number)
                self._clear_bit(number, holder.bit)
        self.version += 1

    def drop(self, source: Source) -> None:
        """``source`` holds nothing, and may be gone."""
        holder = self._holders.pop(source, None)
        if holder is None:
            return
        for number in holder.hashes:
            self._clear_bit(number, holder.bit)
        self._free_bits.append(holder.bit)
        self._access.clear()
        self.version += 1

    # -- what is asked --------------------------------------------------------------------------------------------

    def runs(self, hashes: Sequence[int]) -> tuple[Run, ...]:
        """The longest known prefix of ``hashes``, as far as somebody has each block; takes a dictionary look-up a
        block. Marks it as used: its head last, so that a prefix loses its tail first."""
        masks = self._masks
        found: list[int] = []
        for number in hashes:
            mask = masks.get(number, 0)
            if not mask:
                break
            found.append(mask)
        for number, mask in zip(reversed(hashes[: len(found)]), reversed(found), strict=True):
            del masks[number]
            masks[number] = mask
        runs: list[Run] = []
        start = 0
        for end in range(1, len(found) + 1):
            if end == len(found) or found[end] != found[start]:
                runs.append(Run(found[start], end - start))
                start = end
        return tuple(runs)

    def loadable(self, runs: Sequence[Run], reader: Reader) -> dict[Tier, int]:
        """Blocks of the prefix that ``reader`` can reuse, by the nearest tier that has them.

        An engine takes the leading blocks that are in its own memory, then goes on in the tiers below; blocks of its
        own memory behind a gap are of no use to it.
        """
        access = self._access.get(reader)
        if access is None:
            access = self._access[reader] = self._access_of(reader)
        blocks: dict[Tier, int] = {}
        leading = True
        for run in runs:
            for tier, mask in access:
                if run.mask & mask and (leading or tier is not Tier.GPU):
                    leading = leading and tier is Tier.GPU
                    blocks[tier] = blocks.get(tier, 0) + run.blocks
                    break
            else:
                break
        return blocks

    def check(self) -> None:
        """Assert that masks and holders agree; linear in all that is known."""
        bits = [holder.bit for holder in self._holders.values()]
        assert len(set(bits)) == len(bits), "two holders share a bit"
        assert not set(bits) & set(self._free_bits), "a free bit is in use"
        assert len(self._masks) <= self.max_blocks
        masks: dict[int, int] = {}
        for holder in self._holders.values():
            for number in holder.hashes:
                masks[number] = masks.get(number, 0) | 1 << holder.bit
        assert masks == self._masks, "masks and holders disagree"

    def _add_holder(self, source: Source) -> _Holder:
        bit = self._free_bits.pop() if self._free_bits else len(self._holders)
        holder = self._holders[source] = _Holder(bit)
        self._access.clear()
        return holder

    def _access_of(self, reader: Reader) -> list[tuple[Tier, int]]:
        masks = dict.fromkeys(Tier, 0)
        for source, holder in self._holders.items():
            if reader.can_load(source):
                masks[source.tier] |= 1 << holder.bit
        return [(tier, mask) for tier, mask in masks.items() if mask]

    def _clear_bit(self, number: int, bit: int) -> None:
        mask = self._masks[number] & ~(1 << bit)
        if mask:
            self._masks[number] = mask
        else:
            del self._masks[number]

    def _forget(self, number: int) -> None:
        mask = self._masks.pop(number)
        for holder in self._holders.values():
            if mask >> holder.bit & 1:
                holder.hashes.discard(number)
        self.forgotten += 1
