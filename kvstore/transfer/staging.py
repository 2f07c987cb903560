"""Rings of staging buffers: scattered pages are gathered into a buffer, which travels as one piece, and scattered.

What comes from a peer lands in such a buffer first, so that a transfer can be given up at any time: pages are written
by their own process only.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmserve.kvstore.transfer.runs import Spans

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

SLOTS = 4
"""In each direction."""


def slot_bytes(*, gpu: bool) -> int:
    """Of one buffer: on GPUs, where copies are fast, each costs less than what Python does for it."""
    return (16 << 20) if gpu else (4 << 20)


@dataclass(frozen=True, slots=True)
class Slot:
    """One buffer."""

    address: int
    buffer: object
    """A numpy array or a torch tensor of bytes."""
    size_bytes: int


class Staging(ABC):
    """Buffers of one place for one direction."""

    def __init__(self) -> None:
        self._free: list[Slot] = []
        self._made = 0

    def take(self) -> Slot | None:
        """A free buffer, made at its first use; None if all are taken."""
        if self._free:
            return self._free.pop()
        if self._made == SLOTS:
            return None
        self._made += 1
        return self._make()

    def give(self, slot: Slot) -> None:
        self._free.append(slot)

    def abandon(self) -> None:
        """A taken buffer may be written to for ever: another one takes its place."""
        self._made -= 1

    @abstractmethod
    def _make(self) -> Slot: ...

    @abstractmethod
    def gather(self, spans: Spans, slot: Slot) -> None:
        """Copy the pieces into the buffer, one after the other; done on return."""

    @abstractmethod
    def scatter(self, slot: Slot, spans: Spans) -> None:
        """Copy the buffer to the pieces; done on return."""


class HostStaging(Staging):
    """In host memory."""

    def _make(self) -> Slot:
        import numpy

        buffer: NDArray[numpy.uint8] = numpy.empty(slot_bytes(gpu=False), dtype=numpy.uint8)
        return Slot(int(buffer.ctypes.data), buffer, buffer.nbytes)

    def gather(self, spans: Spans, slot: Slot) -> None:
        at = slot.address
        for address, size in spans:
            ctypes.memmove(at, address, size)
            at += size

    def scatter(self, slot: Slot, spans: Spans) -> None:
        at = slot.address
        for address, size in spans:
            ctypes.memmove(address, at, size)
            at += size
