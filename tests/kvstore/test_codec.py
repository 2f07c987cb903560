"""What is stored comes back, or is refused: every encoding, every kind of damage."""

from __future__ import annotations

import base64
import os
import threading

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve.kvstore.codec import (
    HEADER_BYTES,
    BadPage,
    Codec,
    DiskType,
    KeyProblem,
    PageKind,
    ValueType,
    encryption_key,
    read_header,
)
from llmserve.kvstore.keys import PageKey
from llmserve.kvstore.priority import keep_to_one_core
from llmserve.kvstore.quantize import Bytes, dequantize, group_size, quantize

KEY = PageKey("f00d" * 4, "t-a", bytes(range(32)))
SECRET = bytes(range(100, 132))
TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def a_page(values: int = 4096, dtype: ValueType = "bf16", seed: int = 1, scale: float = 1.0) -> Bytes:
    generator = torch.Generator().manual_seed(seed)
    # Channels differ by orders of magnitude, as keys do.
    drawn = torch.randn(values, generator=generator) * torch.logspace(-2, 1, 64).repeat(values // 64) * scale
    page: Bytes = drawn.to(TORCH[dtype]).view(torch.uint8).numpy()
    return page


def numbers(page: Bytes, dtype: str = "bf16") -> torch.Tensor:
    return torch.from_numpy(page).view(TORCH[dtype]).float()


def codec(
    disk: DiskType = "int8", values: ValueType = "bf16", page_bytes: int = 8192, key: bytes | None = None
) -> Codec:
    return Codec(PageKind(values, page_bytes, 64), disk, key)


def decoded(codec: Codec, data: bytes, key: PageKey = KEY) -> Bytes:
    page = np.zeros(codec.kind.page_bytes, np.uint8)
    codec.decode(key, data, page)
    return page


@pytest.mark.parametrize("key", [None, SECRET], ids=["plain", "sealed"])
@pytest.mark.parametrize("disk", ["raw", "zstd"])
@given(page=st.binary(min_size=1, max_size=3000), parent=st.sampled_from([b"", bytes(range(32))]))
@settings(max_examples=40, deadline=None)
def test_lossless_encodings_return_any_bytes(disk: DiskType, key: bytes | None, page: bytes, parent: bytes) -> None:
    made = codec(disk, page_bytes=len(page), key=key)
    data = made.encode(KEY, np.frombuffer(page, np.uint8).copy(), parent)
    assert len(data) <= made.most_bytes
    assert decoded(made, data).tobytes() == page
    assert read_header(data).parent == parent


@pytest.mark.parametrize("page_bytes", [1, 4096, 100_000, 2**20])
def test_no_page_takes_more_bytes_than_its_codec_says(page_bytes: int) -> None:
    made = codec("zstd", page_bytes=page_bytes, key=SECRET)
    noise = np.random.default_rng(1).integers(0, 256, page_bytes).astype(np.uint8)
    assert page_bytes < len(made.encode(KEY, noise, bytes(32))) <= made.most_bytes


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@given(
    values=st.lists(st.floats(-60000, 60000, width=16), min_size=64, max_size=64),
    groups=st.integers(1, 5),
    power=st.integers(-12, 0),
)
@settings(max_examples=150, deadline=None)
def test_an_int8_value_is_off_by_half_its_groups_scale_at_most(
    dtype: ValueType, values: list[float], groups: int, power: int
) -> None:
    drawn = torch.tensor(values).repeat(groups).mul(2.0**power).to(TORCH[dtype])
    page = drawn.view(torch.uint8).numpy()
    small = quantize(page, dtype, 64)
    assert small is not None
    back = np.zeros_like(page)
    dequantize(small, back, dtype, 64)
    scale = drawn.float().abs().amax() / 127
    # The scale itself is rounded to 11 bits, or to a multiple of 2**-24 if it is tiny; the result to the page's type.
    bound = (
        scale * 0.5
        + drawn.float().abs() * {"bf16": 2**-8, "fp16": 2**-10, "fp32": 2**-23}[dtype]
        + scale * 127 * 2**-11
        + 127 * 2**-24
    )
    assert bool(((numbers(back, dtype) - drawn.float()).abs() <= bound).all())


def test_a_page_of_several_pieces_is_quantized_as_its_parts_are() -> None:
    groups = 9001
    drawn = torch.randn(groups, 64, generator=torch.Generator().manual_seed(1)) * torch.rand(groups, 1)
    page = drawn.to(torch.bfloat16).view(torch.uint8).numpy().reshape(-1)
    whole, back = quantize(page, "bf16", 64), np.zeros_like(page)
    assert whole is not None
    dequantize(whole, back, "bf16", 64)
    scales, values = whole[: groups * 2], whole[groups * 2 :]
    for first in range(0, groups, 1000):
        last = min(first + 1000, groups)
        part = quantize(page[first * 128 : last * 128], "bf16", 64)
        assert part is not None
        assert np.array_equal(part, np.concatenate((scales[first * 2 : last * 2], values[first * 64 : last * 64])))
        alone = np.zeros_like(page[first * 128 : last * 128])
        dequantize(part, alone, "bf16", 64)
        assert np.array_equal(alone, back[first * 128 : last * 128])


def test_the_codec_keeps_to_its_thread_if_told_to_and_the_others_keep_theirs() -> None:
    before = torch.get_num_threads()
    if before == 1:
        pytest.skip("torch has one thread only")
    page, made, seen = a_page(1_000_000), codec(page_bytes=2_000_000), []

    def processes() -> set[str]:
        # torch gives each thread that needs them threads of its own.
        return set(os.listdir("/proc/self/task"))

    def run(told: bool) -> None:
        if told:
            keep_to_one_core()
        before = processes()
        decoded(made, made.encode(KEY, page))
        seen.append((torch.get_num_threads(), len(processes() - before)))

    for told in (True, False):
        thread = threading.Thread(target=run, args=(told,))
        thread.start()
        thread.join()
    assert seen[0] == (1, 0)
    assert seen[1] == (before, before - 1)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("values", ["bf16", "fp16", "fp32"])
def test_int8_is_half_of_16_bits_and_keeps_the_order_of_magnitude_of_each_channel(values: ValueType) -> None:
    page = a_page(65536, values)
    made = codec(values=values, page_bytes=page.size)
    data = made.encode(KEY, page)
    assert len(data) <= 0.5 * 65536 * 2
    back = decoded(made, data)
    error = (numbers(back, values) - numbers(page, values)).norm() / numbers(page, values).norm()
    assert error < 0.015


@pytest.mark.parametrize(("values", "width"), [("bf16", 2), ("fp32", 4)])
def test_a_page_that_is_no_multiple_of_the_group_keeps_its_end_as_it_is(values: ValueType, width: int) -> None:
    rest = 35 * width
    page = np.concatenate((a_page(dtype=values), np.arange(rest, dtype=np.uint8)))
    made = codec(values=values, page_bytes=page.size)
    assert decoded(made, made.encode(KEY, page))[-rest:].tolist() == page[-rest:].tolist()


def test_zeros_stay_zeros() -> None:
    made = codec()
    assert not decoded(made, made.encode(KEY, np.zeros(8192, np.uint8))).any()


@pytest.mark.parametrize(
    ("values", "odd"),
    [("bf16", float("nan")), ("bf16", float("inf")), ("fp32", float("nan")), ("fp32", float("-inf")), ("fp32", 1e9)],
)
def test_a_page_that_int8_cannot_express_is_stored_as_it_is(values: ValueType, odd: float) -> None:
    page = a_page(dtype=values)
    torch.from_numpy(page).view(TORCH[values])[77] = odd
    made = codec(values=values, page_bytes=page.size)
    data = made.encode(KEY, page)
    assert read_header(data).encoding == "zstd"
    assert decoded(made, data).tobytes() == page.tobytes()


@pytest.mark.parametrize(("values", "group"), [("fp8", 64), ("fp32", None), ("bf16", None)])
def test_pages_that_gain_nothing_by_int8_pass_through_it(values: ValueType, group: int | None) -> None:
    made = Codec(PageKind(values, 8192, group), "int8")
    page = a_page()
    assert made.disk == "zstd"
    assert decoded(made, made.encode(KEY, page)).tobytes() == page.tobytes()


@pytest.mark.parametrize(
    ("heads", "group"), [((64,), 64), ((128, 64), 64), ((96,), 32), ((80,), 16), ((576,), 64), ((36,), None)]
)
def test_groups_divide_every_head_so_that_keys_and_values_never_share_a_scale(
    heads: tuple[int, ...], group: int | None
) -> None:
    assert group_size(heads) == group


@pytest.mark.parametrize("head", [64, 96, 80])
def test_a_loud_value_beside_a_quiet_key_does_not_blur_it(head: int) -> None:
    # [K | V] of each token side by side, as on GPUs.
    group = group_size([head])
    assert group is not None
    page = torch.cat((torch.full((head,), 0.01), torch.full((head,), 100.0))).repeat(4).to(torch.bfloat16)
    small = quantize(page.view(torch.uint8).numpy(), "bf16", group)
    assert small is not None
    back = np.zeros(page.numel() * 2, np.uint8)
    dequantize(small, back, "bf16", group)
    assert torch.allclose(numbers(back), page.float(), rtol=0.01)


@pytest.mark.parametrize("disk", ["raw", "zstd", "int8"])
@pytest.mark.parametrize("key", [None, SECRET], ids=["plain", "sealed"])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_change_to_stored_bytes_is_noticed(disk: DiskType, key: bytes | None, data: st.DataObject) -> None:
    made = codec(disk, key=key)
    stored = bytearray(made.encode(KEY, a_page(), bytes(32)))
    at = data.draw(st.integers(0, len(stored) - 1))
    stored[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(BadPage):
        decoded(made, bytes(stored))


@pytest.mark.parametrize("disk", ["raw", "int8"])
@given(cut=st.integers(0, 3000))
@settings(max_examples=40, deadline=None)
def test_a_truncated_or_longer_page_is_noticed(disk: DiskType, cut: int) -> None:
    made = codec(disk)
    stored = made.encode(KEY, a_page())
    for wrong in (stored[: len(stored) - 1 - cut % (len(stored) - 1)], stored + bytes(1 + cut)):
        with pytest.raises(BadPage):
            decoded(made, wrong)


@pytest.mark.parametrize("key", [None, SECRET], ids=["plain", "sealed"])
@pytest.mark.parametrize("other", [{"space": "t-b"}, {"block": bytes(32)}, {"fingerprint": "0" * 16}, {"group": 1}])
def test_a_page_under_another_name_is_refused(key: bytes | None, other: dict[str, object]) -> None:
    made = codec(key=key)
    with pytest.raises(BadPage):
        decoded(made, made.encode(KEY, a_page()), msgspec.structs.replace(KEY, **other))


def test_who_forges_the_checksum_still_lacks_the_key() -> None:
    """A page of tenant b, with header and checksum made right for tenant a's name: only the seal can refuse it."""
    import struct

    from llmserve.kvstore import codec as module

    made = codec(key=SECRET)
    theirs = msgspec.structs.replace(KEY, space="t-b")
    stored = made.encode(theirs, a_page())
    head, payload = stored[: HEADER_BYTES - 8], stored[HEADER_BYTES:]
    forged = head + struct.pack("<Q", module._checksum(head, KEY, payload)) + payload
    with pytest.raises(BadPage, match="not authentic"):
        decoded(made, forged)


def test_keys_must_be_the_same_on_both_sides() -> None:
    page = a_page()
    sealed, plain = codec(key=SECRET).encode(KEY, page), codec().encode(KEY, page)
    assert page[:64].tobytes() not in codec("raw", key=SECRET).encode(KEY, page)
    for reader, data in ((codec(), sealed), (codec(key=SECRET), plain), (codec(key=bytes(32)), sealed)):
        with pytest.raises(BadPage):
            decoded(reader, data)


def test_two_seals_of_one_page_differ() -> None:
    made = codec(key=SECRET)
    assert made.encode(KEY, a_page()) != made.encode(KEY, a_page())


def test_a_page_of_another_kind_is_refused() -> None:
    stored = codec().encode(KEY, a_page())
    for reader in (codec(values="fp16"), codec(page_bytes=4096)):
        with pytest.raises(BadPage):
            decoded(reader, stored)


@pytest.mark.parametrize("text", [SECRET.hex(), base64.b64encode(SECRET).decode(), f" {SECRET.hex()}\n"])
def test_a_key_is_read_from_the_environment(text: str) -> None:
    assert encryption_key("env:K", {"K": text}) == SECRET
    assert encryption_key(None, {}) is None


@pytest.mark.parametrize("text", ["", "secret", "00" * 16, "zz" * 32])
def test_a_key_that_is_none_is_refused_without_being_shown(text: str) -> None:
    with pytest.raises(KeyProblem) as caught:
        encryption_key("env:K", {"K": text})
    assert "K" in str(caught.value)
    assert not text or text not in str(caught.value)
