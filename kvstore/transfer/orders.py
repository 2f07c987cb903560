"""What the owner of pages orders of a mover, and what it hears of the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from llmserve.kvstore.transfer.base import Place, Run
from llmserve.kvstore.transfer.ladder import Rung


class Ends(msgspec.Struct, frozen=True, array_like=True):
    """What a mover says of itself to its peers."""

    mover: str
    """Unique per incarnation."""
    engines: dict[str, bytes]
    """Description of each."""
    probe: int = 0
    """Address of the memory that probes read and write."""
    probe_bytes: int = 0
    probe_gpu: int | None = None


@dataclass(frozen=True, slots=True)
class Fetch:
    """Pages wanted by the owner: ``runs``, then ``fence``, which lies in host memory on both sides."""

    id: str
    ends: Ends
    runs: Sequence[Run]
    local: Place
    remote: Place
    fence: Run | None
    timeout_s: float
    """For all attempts together, from the first one on."""
    expires_s: float = math.inf
    """Monotonic time after which no attempt begins: the lease is nearly over."""
    after: object = None
    """For ``TransferEngine.order_after``."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try on one rung; ``failure`` as in ``Transfer``."""

    rung: Rung
    bytes_moved: int
    seconds: float
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Fetched:
    """The end of a fetch; the last attempt decided it."""

    id: str
    failure: str
    attempts: list[Attempt]
