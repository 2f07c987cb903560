"""What the router's core wants done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import msgspec

from llmserve.bus.messages import AttemptLost, Cancel, Grant, Rejected, Sync


class SendGrant(msgspec.Struct, frozen=True):
    """Send work to a worker and report ``NoResponders`` if nobody takes it."""

    worker: str
    grant: Grant
    waited_s: float
    """Since the request, or its handoff, came to the router."""


@dataclass(frozen=True, slots=True)
class SendAhead:
    """Offer a worker the first pages of a prompt; nobody minds if it is not there."""

    worker: str
    grant: Grant


@dataclass(frozen=True, slots=True)
class NotifyGateway:
    """Tell the gateway that waits for a request what became of it."""

    gateway: str
    message: AttemptLost | Rejected


@dataclass(frozen=True, slots=True)
class Discard:
    """Take a request off the stream; it may be gone already."""

    seq: int


@dataclass(frozen=True, slots=True)
class CheckStored:
    """Find out whether a request is still on the stream and report ``Checked``."""

    seq: int


@dataclass(frozen=True, slots=True)
class Broadcast:
    """Tell everyone."""

    message: Cancel | Sync


@dataclass(frozen=True, slots=True)
class AskSnapshot:
    """Ask a member for all the pages that it holds."""

    member: str


Action: TypeAlias = SendGrant | SendAhead | NotifyGateway | Discard | CheckStored | Broadcast | AskSnapshot
