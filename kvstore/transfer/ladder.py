"""Which engine and direction a pair of ends uses next; no I/O.

Every (engine, direction) is a rung. All are probed once a pair; the fastest that is not cooling down is used. A rung
that fails cools down, twice as long each time in a row; one whose speed falls to less than half of what was measured
asks for new probes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Direction = Literal["pull", "push", "load"]
"""A load is a pull that the device's next work waits for, see ``express``; it stands on no ladder."""

COOL_DOWN_S = 2.0
COOL_DOWN_MAX_S = 120.0
PUSH_GAIN = 1.25
"""How much faster a push has to be: it cannot be called back at once, see ``mover``."""
SLOW = 0.5
"""Of the measured speed; below it the pair is probed anew."""
SLOW_IN_A_ROW = 3
"""One slow transfer may have shared the wire."""
MEASURED_BYTES = 1 << 20
"""Smaller transfers say more of latency than of speed."""
_SMOOTHING = 0.2


@dataclass(frozen=True, slots=True)
class Rung:
    """One way to move pages."""

    engine: str
    direction: Direction

    def __str__(self) -> str:
        return f"{self.engine} {self.direction}"


@dataclass(slots=True)
class _Record:
    order: int
    probed_bytes_s: float | None = None
    """Of the last probe; None: not measured yet."""
    bytes_s: float | None = None
    """Smoothed over transfers."""
    failures: int = 0
    """In a row."""
    cool_until_s: float = 0.0
    probe_due: bool = True
    slow: int = 0


class Ladder:
    """The rungs between two ends, in the order of preference as long as nothing is measured."""

    def __init__(self, rungs: Sequence[Rung]) -> None:
        self._records = {rung: _Record(order) for order, rung in enumerate(rungs)}

    def choose(self, now_s: float, tried: Collection[Rung] = ()) -> Rung | None:
        """The best rung that is not cooling down and not in ``tried``; None if there is none."""
        usable = [r for r in self._records if r not in tried and self._records[r].cool_until_s <= now_s]
        return min(usable, key=self._rank, default=None)

    def _rank(self, rung: Rung) -> tuple[float, int]:
        # What is not measured comes after what is, in its order.
        record = self._records[rung]
        return -(record.bytes_s or 0.0) / (PUSH_GAIN if rung.direction == "push" else 1.0), record.order

    def due(self, now_s: float) -> list[Rung]:
        """Rungs to be probed now."""
        return [r for r, record in self._records.items() if record.probe_due and record.cool_until_s <= now_s]

    def probed(self, rung: Rung, size_bytes: int, seconds: float) -> None:
        """A probe succeeded."""
        record = self._records[rung]
        record.probed_bytes_s = record.bytes_s = size_bytes / max(seconds, 1e-9)
        record.probe_due, record.failures, record.slow = False, 0, 0

    def moved(self, rung: Rung, size_bytes: int, seconds: float) -> bool:
        """A transfer succeeded; whether it makes new probes due."""
        record = self._records[rung]
        record.failures = 0
        if size_bytes < MEASURED_BYTES or record.bytes_s is None or record.probed_bytes_s is None:
            return False
        bytes_s = size_bytes / max(seconds, 1e-9)
        record.bytes_s += _SMOOTHING * (bytes_s - record.bytes_s)
        record.slow = record.slow + 1 if bytes_s < SLOW * record.probed_bytes_s else 0
        if record.slow < SLOW_IN_A_ROW:
            return False
        record.slow = 0
        for other in self._records.values():
            other.probe_due = True
        return True

    def failed(self, rung: Rung, now_s: float) -> float:
        """A transfer or a probe failed or stalled; seconds for which the rung is not used."""
        record = self._records[rung]
        wait_s = min(COOL_DOWN_S * 2.0**record.failures, COOL_DOWN_MAX_S)
        record.failures += 1
        record.cool_until_s = now_s + wait_s
        return wait_s

    def expected_s(self, rung: Rung, size_bytes: int) -> float | None:
        """How long a transfer should take; None if unknown."""
        speed = self._records[rung].bytes_s
        return size_bytes / speed if speed else None

    def rates(self) -> dict[Rung, float]:
        """Bytes a second of what has been measured."""
        return {rung: record.bytes_s for rung, record in self._records.items() if record.bytes_s is not None}


def rungs(engines: Iterable[str], *, push: bool = True) -> list[Rung]:
    """Both directions of each engine, pulls first."""
    names = list(engines)
    pulls = [Rung(name, "pull") for name in names]
    return [*pulls, *(Rung(name, "push") for name in names)] if push else pulls
