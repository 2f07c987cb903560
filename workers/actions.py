"""What a worker's decisions ask its shell to do."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TypeAlias

from llmserve.bus.messages import (
    Accepted,
    Deltas,
    Failed,
    Finished,
    Grant,
    HandedOff,
    Prefilling,
    Refused,
    Request,
    Result,
    Stage,
)
from llmserve.workers.engine.base import Work


class Status(enum.Enum):
    RUNNING = "running"
    HELD = "held"
    """Prefilled; its pages wait for a decode worker."""
    ENDING = "ending"
    """Out of the engine; its result is being recorded."""


@dataclass(slots=True, eq=False)
class Task:
    """One accepted grant."""

    seq: int
    tenant: str
    stage: Stage
    request: Request
    work_id: str
    sent: int
    """Output tokens of this attempt so far, those of the prefill worker included."""
    status: Status = Status.RUNNING
    cancelled: bool = False
    cached_tokens: int = 0
    moved_bytes: int = 0
    """Page bytes fetched for it, ahead of its grant too."""
    handed_off: HandedOff | None = None
    lease_until_s: float = 0.0

    @property
    def held(self) -> bool:
        return self.status is Status.HELD


Event: TypeAlias = Accepted | Refused | Prefilling | HandedOff | Finished | Failed


@dataclass(frozen=True, slots=True)
class Tell:
    """Publish an event to the router."""

    event: Event


@dataclass(frozen=True, slots=True)
class Deliver:
    """Publish deltas to a gateway."""

    gateway: str
    deltas: Deltas


@dataclass(frozen=True, slots=True)
class Submit:
    """Give work to the engine, then call ``accepted`` or ``refused``."""

    task: Task
    grant: Grant
    work: Work


@dataclass(frozen=True, slots=True)
class FetchAhead:
    """Give work to the engine that nothing depends on."""

    work: Work


@dataclass(frozen=True, slots=True)
class Abort:
    """Take work out of the engine."""

    work_ids: list[str]


@dataclass(frozen=True, slots=True)
class Fetch:
    """Read a request that was too large for its grant, then call ``fetched``."""

    grant: Grant


@dataclass(frozen=True, slots=True)
class Complete:
    """Record the result, then call ``completed``."""

    task: Task
    result: Result


@dataclass(frozen=True, slots=True)
class Beat:
    """Credit or inventory changed: send a heartbeat soon, or at once."""

    at_once: bool = False


Action: TypeAlias = Tell | Deliver | Submit | FetchAhead | Abort | Fetch | Complete | Beat
