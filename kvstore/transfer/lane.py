"""The data connection of a pair of engines, and what they tell each other beside it."""

from __future__ import annotations

from abc import ABC, abstractmethod

import msgspec

from llmserve.kvstore.transfer.base import TransferError
from llmserve.kvstore.transfer.staging import Slot


class Op(ABC):
    """One buffer on its way."""

    @abstractmethod
    def done(self) -> bool:
        """Raises ``TransferError`` if it will never be."""


class Lane(ABC):
    """Moves buffers between two ends. Opening it takes both and may take a while."""

    @abstractmethod
    def ready(self) -> bool:
        """Raises ``TransferError`` if it cannot be opened."""

    @abstractmethod
    def send(self, slot: Slot, size_bytes: int, tag: int) -> Op:
        """The peer has posted the receipt of ``tag``. Raises ``TransferError``."""

    @abstractmethod
    def receive(self, slot: Slot, size_bytes: int, tag: int) -> Op:
        """Tags count up from 0. Raises ``TransferError``."""

    @abstractmethod
    def close(self) -> None:
        """Give up what is on its way, as far as that can be done, without waiting for the peer; never raises."""


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Base of the messages. ``id`` is even for transfers of the end that dialled, odd for the other's."""


class Hello(Message, frozen=True):
    """The first one, of the end that dialled."""

    key: bytes
    """From the description of the other end."""
    name: str
    lane_id: int
    info: bytes
    """What the lane needs to know of this end."""


class Want(Message, frozen=True):
    """Send me these bytes."""

    id: int
    spans: list[tuple[int, int]]
    gpu: bool
    inline: bool
    """In an ``Inline`` message."""


class Inline(Message, frozen=True):
    id: int
    data: bytes


class Offer(Message, frozen=True):
    """I have bytes for these places of yours."""

    id: int
    spans: list[tuple[int, int]]
    gpu: bool


class Grant(Message, frozen=True):
    """The receiver is ready for the next chunk of a transfer, of ``size_bytes``. It is always answered by as much."""

    id: int
    tag: int
    size_bytes: int


class Done(Message, frozen=True):
    """The receiver has everything."""

    id: int


class Failed(Message, frozen=True):
    id: int
    reason: str


class Note(Message, frozen=True):
    """A notification for the owner of the engine."""

    data: bytes


AnyMessage = Hello | Want | Inline | Offer | Grant | Done | Failed | Note
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: AnyMessage) -> bytes:
    return _encoder.encode(message)


def decode(data: bytes) -> AnyMessage:
    """Raises ``TransferError``."""
    try:
        message: AnyMessage = _decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise TransferError(f"not a message of this protocol: {error}") from error
    return message
