"""Limits of a tenant: what they let through, what they refuse, what they tell."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmserve.gateway.limits import Bucket, LimitExceeded, TenantLimiter, TenantLimits, duration
from llmserve.manifests.schema import Limits, Tenant


def limiter(**limits: object) -> TenantLimiter:
    return TenantLimiter("acme", Limits(**limits), 0.0)  # type: ignore[arg-type]


def test_requests_beyond_a_minutes_worth_wait_for_their_share_of_the_minute() -> None:
    acme = limiter(requests_per_minute=2)
    acme.enter(0.0)
    acme.enter(0.0)
    with pytest.raises(LimitExceeded, match="2 requests per minute") as refused:
        acme.enter(0.0)
    assert refused.value.failure.status == 429
    assert refused.value.failure.retry_after_s == 30
    acme.enter(30.0)


def test_open_requests_are_bounded_until_one_leaves() -> None:
    acme = limiter(concurrency=1)
    acme.enter(0.0)
    with pytest.raises(LimitExceeded, match="1 requests open"):
        acme.enter(0.0)
    acme.leave()
    acme.enter(0.0)


def test_tokens_are_reserved_and_what_is_not_used_goes_back() -> None:
    acme = limiter(tokens_per_minute=100)
    held = acme.reserve(10, 90, 0.0)
    with pytest.raises(LimitExceeded, match="100 tokens per minute"):
        acme.reserve(1, 1, 0.0)
    held.settle(5, 0.0)
    acme.reserve(10, 75, 0.0)
    with pytest.raises(LimitExceeded):
        acme.reserve(1, 0, 0.0)


def test_a_refused_request_costs_no_tokens() -> None:
    acme = limiter(tokens_per_minute=100)
    held = acme.reserve(10, 90, 0.0)
    held.settle(0, 0.0)
    held.cancel(0.0)
    acme.reserve(10, 90, 0.0)


def test_a_request_larger_than_the_limit_is_served_when_the_minute_is_full() -> None:
    acme = limiter(tokens_per_minute=100)
    acme.reserve(500, 500, 0.0)
    with pytest.raises(LimitExceeded):
        acme.reserve(1, 1, 0.0)


def test_output_ends_where_the_context_does_and_a_longer_prompt_is_a_bad_request() -> None:
    acme = limiter(max_context_tokens=100)
    assert acme.reserve(60, 1000, 0.0).max_tokens == 40
    with pytest.raises(LimitExceeded, match="maximum context length") as refused:
        acme.reserve(100, 1, 0.0)
    assert refused.value.failure.status == 400


def test_what_other_gateways_let_through_counts_here() -> None:
    acme = limiter(requests_per_minute=3, concurrency=3, tokens_per_minute=100)
    acme.heard("other", requests=3, tokens=100, open_requests=3, now=0.0)
    for attempt in (lambda: acme.enter(0.0), lambda: acme.reserve(1, 1, 0.0)):
        with pytest.raises(LimitExceeded):
            attempt()
    with pytest.raises(LimitExceeded, match="open"):
        acme.enter(2.0)
    # It reports no more: its requests are taken to have ended with it.
    acme.enter(61.0)


def test_the_headers_are_those_that_openais_clients_read() -> None:
    acme = limiter(requests_per_minute=60, tokens_per_minute=600)
    acme.enter(0.0)
    acme.reserve(10, 20, 0.0)
    assert dict(acme.headers(0.0)) == {
        b"x-ratelimit-limit-requests": b"60",
        b"x-ratelimit-remaining-requests": b"59",
        b"x-ratelimit-reset-requests": b"1s",
        b"x-ratelimit-limit-tokens": b"600",
        b"x-ratelimit-remaining-tokens": b"570",
        b"x-ratelimit-reset-tokens": b"3s",
    }
    assert limiter().headers(0.0) == []


@pytest.mark.parametrize(("seconds", "text"), [(0.012, "12ms"), (1.5, "1.5s"), (59.0, "59s"), (360.0, "6m0s")])
def test_durations_are_written_as_openai_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_changed_limit_keeps_what_was_spent() -> None:
    limits = TenantLimits({"acme": Tenant(limits=Limits(requests_per_minute=10))}, 0.0)
    acme = limits.of("acme")
    assert acme is not None
    for _ in range(10):
        acme.enter(0.0)
    limits.change({"acme": Tenant(limits=Limits(requests_per_minute=12)), "new": Tenant()}, 0.0)
    acme.enter(0.0)
    acme.enter(0.0)
    with pytest.raises(LimitExceeded):
        acme.enter(0.0)
    assert limits.of("new") is not None
    limits.change({}, 0.0)
    assert limits.of("acme") is None


@given(st.lists(st.tuples(st.floats(0, 20), st.integers(1, 30)), max_size=60))
def test_no_minute_lets_through_more_than_a_full_bucket_and_its_refill(steps: list[tuple[float, int]]) -> None:
    bucket, now, taken = Bucket(60, 0.0), 0.0, 0
    for pause_s, amount in steps:
        now += pause_s
        if bucket.wait_s(amount, now) == 0:
            bucket.take(amount, now)
            taken += amount
    assert taken <= 60 + now + 1e-6
