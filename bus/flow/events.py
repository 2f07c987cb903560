"""What the router's core is told. Messages of workers, members and gateways are events as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from llmserve.bus.base import StoredRequest
from llmserve.bus.messages import (
    Accepted,
    Cancel,
    Failed,
    Finished,
    HandedOff,
    Heartbeat,
    KvEvents,
    Prefilling,
    Refused,
)


@dataclass(frozen=True, slots=True)
class NoResponders:
    """The server says that nobody listens where a grant was sent."""

    worker: str
    seq: int


@dataclass(frozen=True, slots=True)
class MemberLost:
    """Positive evidence from outside that a member is gone."""

    member: str


@dataclass(frozen=True, slots=True)
class Absent:
    """The server says that nobody listens at a member's own subject."""

    member: str


@dataclass(frozen=True, slots=True)
class StreamRead:
    """All that was stored at one moment."""

    last_seq: int
    seqs: frozenset[int]


@dataclass(frozen=True, slots=True)
class Checked:
    """Answer to ``CheckStored``."""

    seq: int
    stored: bool | None
    """None: the bus did not answer, ask again later."""


@dataclass(frozen=True, slots=True)
class Reconnected:
    """The bus was away: silence until now says nothing about anyone, and members may be slower to return."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Told: TypeAlias = Accepted | Refused | Prefilling | HandedOff | Finished | Failed | Heartbeat | KvEvents | Cancel
"""Messages of workers, members and gateways."""

Event: TypeAlias = (
    Told | StoredRequest | NoResponders | MemberLost | Absent | StreamRead | Checked | Reconnected | Tick
)
