"""What movers say to each other, by any engine that reaches the other one."""

from __future__ import annotations

import msgspec

from llmserve.kvstore.transfer.orders import Ends


class Ask(msgspec.Struct, frozen=True, tag="ask", array_like=True):
    """Push these to me."""

    id: int
    ends: Ends
    engine: str
    runs: bytes
    """int64 of shape (runs, 3): your address, mine, size."""
    mine: int | None
    """GPU of my memory."""
    yours: int | None


class Pushed(msgspec.Struct, frozen=True, tag="pushed", array_like=True):
    """A push that you asked for has ended."""

    mover: str
    id: int
    ok: bool
    reason: str = ""


class Stop(msgspec.Struct, frozen=True, tag="stop", array_like=True):
    """I do not wait for that push any more: tell me when it is off."""

    mover: str
    id: int


class Note(msgspec.Struct, frozen=True, tag="note", array_like=True):
    """For the mover's owner."""

    data: bytes


Call = Ask | Pushed | Stop | Note
_decoder: msgspec.msgpack.Decoder[Call] = msgspec.msgpack.Decoder(Call)


def decode(data: bytes) -> Call:
    """Raises ``msgspec.MsgspecError``."""
    return _decoder.decode(data)
