"""What travels between connectors."""

from __future__ import annotations

import msgspec
import pytest

from llmserve.workers.connector.wire import Handoff, WireError, decode_handoff, decode_rank, done, encode, parse_done

HANDOFF = Handoff(
    engine_id="e",
    fingerprint="f",
    request="r",
    slot=3,
    token=2**63 - 1,
    tokens=20,
    lease_s=1.5,
    tp=1,
    pp=1,
    pages=[[1, 2]],
    ranks={"0/0": b"x"},
)


def test_a_handoff_survives_the_wire() -> None:
    assert decode_handoff(encode(HANDOFF)) == HANDOFF


def test_another_version_is_refused() -> None:
    with pytest.raises(WireError, match="version 3"):
        decode_handoff(encode(msgspec.structs.replace(HANDOFF, v=3)))


@pytest.mark.parametrize("data", [b"", b"nonsense", b"\x90"])
def test_bytes_that_are_no_handoff_are_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        decode_handoff(data)
    with pytest.raises(WireError):
        decode_rank(data)


def test_a_notification_names_its_request() -> None:
    assert parse_done(done("a.0.1")) == "a.0.1"
    assert parse_done(b"other:x") is None
    assert parse_done(b"done:\xff") is None
