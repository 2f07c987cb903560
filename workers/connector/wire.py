"""What travels between the connectors of two engines: inside ``kv_transfer_params``, so on the bus."""

from __future__ import annotations

import msgspec

from llmserve.kvstore.transfer.orders import Ends

VERSION = 2

HOLD = "llmserve_hold"
"""Key of ``kv_transfer_params``: true asks a producer to hold the pages of the prompt when it is done."""
HANDOFF = "llmserve_handoff"
"""Key: an encoded ``Handoff``, out of a producer and into a consumer."""
RELEASE = "llmserve_release"
"""Key: ids of requests whose held pages a producer is to release; of a pre-aborted request that does nothing else."""

_DONE = b"done:"


class WireError(ValueError):
    """Bytes that are no handoff, or one of another version."""


class RankPages(msgspec.Struct, frozen=True, array_like=True):
    """Where one rank of a producer keeps its pages."""

    ends: Ends
    """Its transfer engines."""
    gpu: int | None
    """Device index of the pages' memory, None for host memory."""
    strips: list[list[tuple[int, int, int]]]
    """By group and layer: address of page 0, stride and size of a page in bytes."""
    table: int
    """Address of the lease table: uint64 values in host memory."""


class Handoff(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """A prompt's pages, held under a lease by a producer."""

    v: int = VERSION
    engine_id: str
    """Unique per incarnation of the producer."""
    fingerprint: str
    request: str
    """Id of the request in the producer."""
    slot: int
    """Of the lease table, on every rank."""
    token: int
    """What the slot holds as long as the pages are valid; never 0."""
    tokens: int
    """Prompt tokens that the pages cover."""
    lease_s: float
    """Seconds from the end of the prefill during which the pages are held."""
    tp: int
    pp: int
    pages: list[list[int]]
    """Page numbers by group."""
    ranks: dict[str, bytes]
    """``pp/tp`` -> encoded ``RankPages``."""
    cached_tokens: int = 0
    """Prompt tokens that the producer did not have to compute."""
    ahead: bool = False
    """The prompt is still being computed: what is read is not to be given back, the whole handoff follows."""


def rank_key(pp_rank: int, tp_rank: int) -> str:
    """Key of ``Handoff.ranks``."""
    return f"{pp_rank}/{tp_rank}"


def encode(value: Handoff | RankPages) -> bytes:
    return msgspec.msgpack.encode(value)


def decode_handoff(data: bytes) -> Handoff:
    """Raises ``WireError``."""
    try:
        handoff = msgspec.msgpack.decode(data, type=Handoff)
    except msgspec.MsgspecError as error:
        raise WireError(f"not a handoff: {error}") from error
    if handoff.v != VERSION:
        raise WireError(f"handoff version {handoff.v}, this is version {VERSION}")
    return handoff


def decode_rank(data: bytes) -> RankPages:
    """Raises ``WireError``."""
    try:
        return msgspec.msgpack.decode(data, type=RankPages)
    except msgspec.MsgspecError as error:
        raise WireError(f"not a rank's pages: {error}") from error


def done(request: str) -> bytes:
    """A consumer's notification that it needs the producer's pages no more."""
    return _DONE + request.encode()


def parse_done(message: bytes) -> str | None:
    """The request of a ``done`` notification, None for anything else."""
    if not message.startswith(_DONE):
        return None
    try:
        return message[len(_DONE) :].decode()
    except UnicodeDecodeError:
        return None
