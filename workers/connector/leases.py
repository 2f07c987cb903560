"""Leases on the producer and the fence that makes a late read detectable.

Every rank registers a table of uint64 slots. A handoff names a slot and a random non-zero token; the slot holds the
token exactly as long as the pages may be read, and is zeroed before the pages are reported free. A consumer reads the
slot *after* the pages: if it still finds the token, the pages were valid throughout its read.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

SLOT_BYTES = 8

EARLY_KEPT_S = 60.0
"""How long the end of a lease that is not known yet is remembered."""


def new_token() -> int:
    """A random token, never 0, and within a signed 64-bit integer."""
    return secrets.randbelow(2**63 - 1) + 1


class LeaseTable:
    """The slots of one rank, in memory that peers read."""

    def __init__(self, slots: int) -> None:
        import numpy

        self._values: NDArray[numpy.uint64] = numpy.zeros(slots, dtype=numpy.uint64)

    @property
    def address(self) -> int:
        return int(self._values.ctypes.data)

    @property
    def size_bytes(self) -> int:
        return int(self._values.nbytes)

    def arm(self, slot: int, token: int) -> None:
        """Make the pages behind ``slot`` valid under ``token``."""
        self._values[slot] = token

    def clear(self, slot: int) -> None:
        """Make every later check of ``slot`` fail."""
        self._values[slot] = 0

    def value(self, slot: int) -> int:
        return int(self._values[slot])


@dataclass(slots=True)
class _Lease:
    slot: int
    ends_s: float


@dataclass(slots=True)
class Leases:
    """The leases of one rank. ``ended`` are to be reported to the scheduler, each exactly once."""

    table: LeaseTable
    _held: dict[str, _Lease] = field(default_factory=dict)
    _early: dict[str, float] = field(default_factory=dict)
    _ended: set[str] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self._held)

    def hold(self, request: str, slot: int, lease_s: float, now_s: float) -> None:
        """Start a lease whose slot is armed; at an end already asked for it is over at once."""
        self._held[request] = _Lease(slot, now_s + lease_s)
        if self._early.pop(request, None) is not None:
            self.end(request, now_s)

    def end(self, request: str, now_s: float) -> None:
        """The pages are read, or not needed. The notice may come before the scheduler says that they are held."""
        lease = self._held.pop(request, None)
        if lease is None:
            if request not in self._ended:
                self._early[request] = now_s
            return
        self.table.clear(lease.slot)
        self._ended.add(request)

    def expire(self, now_s: float) -> list[str]:
        """End what is over by now and return it."""
        over = [request for request, lease in self._held.items() if lease.ends_s <= now_s]
        for request in over:
            self.end(request, now_s)
        for request in [r for r, at_s in self._early.items() if at_s + EARLY_KEPT_S < now_s]:
            del self._early[request]
        return over

    def take_ended(self) -> set[str]:
        """Requests whose pages may be freed; their slots are zero already."""
        ended, self._ended = self._ended, set()
        return ended


def lease_over(lease_s: float, age_s: float) -> bool:
    """Whether a lease that is at least ``age_s`` old is too close to its end for a read to begin.

    The fence alone decides what is valid; this spares transfers that it would most likely refuse.
    """
    return lease_ends_s(lease_s, 0.0) < age_s


def lease_ends_s(lease_s: float, begun_s: float) -> float:
    """Until when a read may begin."""
    return begun_s + lease_s - min(1.0, lease_s / 10)
