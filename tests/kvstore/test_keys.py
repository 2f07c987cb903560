"""Page names: one for each key, and back; spaces keep tenants apart."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmserve.kvstore.keys import PageKey, parse_path, space_of, spaces

names = st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True)
keys = st.builds(
    PageKey,
    fingerprint=st.binary(min_size=8, max_size=8).map(bytes.hex),
    space=names.map(lambda name: f"t-{name}"),
    block=st.binary(min_size=32, max_size=32),
    group=st.integers(0, 99),
)


@given(keys)
def test_a_path_names_its_key_and_no_other(key: PageKey) -> None:
    assert parse_path(key.path) == key


@pytest.mark.parametrize(
    "path",
    [
        "",
        "v1/f/all/t-a/00/tmp",
        "v2/f/all/t-a/" + "ab/" + "ab" * 32 + ".0.kv",
        "v1/f/all/t-a/" + "cd/" + "ab" * 32 + ".0.kv",
        "v1/f/all/../" + "ab/" + "ab" * 32 + ".0.kv",
        "v1/f/all/t-a/" + "ab/" + "ab" * 32 + ".0.kv.tmp",
        "v1/f/all/t-a/" + "ab/" + "ab" * 4 + "a.0.kv",
    ],
)
def test_what_is_no_page_has_no_key(path: str) -> None:
    assert parse_path(path) is None


def test_a_tenant_reads_its_own_space_or_its_groups() -> None:
    sharing = {"team": ["a", "b"]}
    assert space_of("a", sharing) == space_of("b", sharing) == "g-team"
    assert space_of("team", sharing) == "t-team"
    assert spaces(["a", "b", "c"], sharing) == {"g-team": ["a", "b"], "t-c": ["c"]}
