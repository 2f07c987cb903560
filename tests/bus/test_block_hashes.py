"""Names of pages: chains of hashes, as vLLM computes them (its own events are asked in the engine's tests)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmserve.bus.block_hashes import MAX_BLOCKS, chain, pack_short, short_hashes, unpack_short

TOKENS = list(range(1000, 1040))
prompts = st.lists(st.integers(0, 50_000), max_size=200)


@pytest.mark.parametrize(
    ("salt", "of_vllm"),
    [("", "3417567050a24fdc2102e4d3c29c9005"), ("tenant-1", "cfd5635ad05f1d35868bc3d0f3dbd08c")],
)
def test_hashes_are_those_that_vllm_0_32_computes(salt: str, of_vllm: str) -> None:
    assert short_hashes(TOKENS, 16, salt).hex() == of_vllm


@given(prompts, prompts, st.integers(1, 32))
def test_prompts_share_hashes_exactly_as_far_as_they_share_full_blocks(
    one: list[int], other: list[int], block: int
) -> None:
    common = 0
    while common < min(len(one), len(other)) and one[common] == other[common]:
        common += 1
    first, second = (unpack_short(short_hashes(tokens, block, "s")) for tokens in (one, other))
    assert (len(first), len(second)) == (len(one) // block, len(other) // block)
    equal = [a == b for a, b in zip(first, second, strict=False)]
    assert equal == [(i + 1) * block <= common for i in range(len(equal))]


@given(prompts, st.integers(1, 32), st.text(max_size=5), st.text(max_size=5))
def test_another_salt_changes_every_hash(tokens: list[int], block: int, one: str, other: str) -> None:
    first, second = (set(unpack_short(short_hashes(tokens, block, salt))) for salt in (one, other))
    assert first.isdisjoint(second) or one == other


@given(prompts, st.integers(1, 32), st.integers(0, 10))
def test_a_chain_goes_on_behind_any_of_its_blocks(tokens: list[int], block: int, at: int) -> None:
    whole = list(chain(tokens, block, "s"))
    at = min(at, len(whole))
    parent = whole[at - 1] if at else b""
    assert list(chain(tokens[at * block :], block, "s", parent)) == whole[at:]


def test_the_number_of_hashes_is_bounded() -> None:
    assert len(unpack_short(short_hashes([1] * (MAX_BLOCKS + 5), 1, ""))) == MAX_BLOCKS
    assert short_hashes([1] * 100, 10, "", 3) == short_hashes([1] * 30, 10, "")


@given(st.lists(st.integers(0, 2**64 - 1)))
def test_short_hashes_survive_packing(numbers: list[int]) -> None:
    assert list(unpack_short(pack_short(numbers))) == numbers


def test_cut_hashes_are_refused() -> None:
    with pytest.raises(ValueError, match="9 bytes are no block hashes"):
        unpack_short(b"123456789")
