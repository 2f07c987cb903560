"""Several buffers in one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmserve.bus.frames import pack, unpack


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=6))
def test_buffers_come_back_as_they_were(buffers: list[bytes]) -> None:
    assert [bytes(part) for part in unpack(pack(buffers))] == buffers


def test_a_single_msgpack_buffer_needs_no_frame() -> None:
    assert pack([b"\x93abc"]) == b"\x93abc"


@given(st.lists(st.binary(max_size=40), min_size=2, max_size=6), st.data())
def test_framed_buffers_cut_short_are_refused(buffers: list[bytes], data: st.DataObject) -> None:
    packed = pack(buffers)
    cut = data.draw(st.integers(1, len(packed) - 1))
    with pytest.raises(ValueError, match="framed buffers"):
        unpack(packed[:cut])
