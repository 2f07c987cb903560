"""Salts divide pages among tenants, whatever a request says."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llmserve.bus.cache_salt import CacheSalts, request_salt

names = st.text("abc", min_size=1, max_size=3)
salts = st.none() | st.text(max_size=70)


def test_tenants_have_salts_of_their_own_and_those_of_a_group_share_one() -> None:
    deployment = CacheSalts("d", {"friends": ["a", "b"]})
    assert deployment.owner("a") == deployment.owner("b")
    assert len({deployment.owner(name) for name in ("a", "c", "d", "friends", "group/friends")}) == 5
    assert deployment.owner("c") != CacheSalts("other", {}).owner("c")


def test_a_tenant_named_like_a_group_is_not_in_it() -> None:
    deployment = CacheSalts("d", {"g": ["a"]})
    assert deployment.owner("g") != deployment.owner("a")


def test_a_clients_own_salt_divides_its_tenants_pages_further() -> None:
    deployment = CacheSalts("d", {})
    made = {
        request_salt(deployment.owner(tenant), own)
        for tenant in "ab"
        for own in (None, "", "x", deployment.owner("a").hex())
    }
    assert len(made) == 8


@given(names, names, salts, salts)
def test_no_salt_in_a_body_makes_one_tenants_pages_anothers(
    one: str, other: str, of_one: str | None, of_other: str | None
) -> None:
    deployment = CacheSalts("d", {})
    # What a gateway writes for ``one``, sent again on the subject of ``other``, or guessed by it.
    written = request_salt(deployment.owner(one), of_one)
    pages = deployment.worker_salt(one, written)
    for guessed in (written, pages, deployment.owner(one).hex(), of_other):
        assert deployment.worker_salt(other, guessed) != pages or other == one
