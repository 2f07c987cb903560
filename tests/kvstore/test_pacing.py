"""The token bucket that paces transfers."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmserve.kvstore.transfer.pacing import TokenBucket

asks = st.lists(st.tuples(st.floats(0, 5), st.integers(1, 500)), min_size=1, max_size=60)


@given(asks, st.floats(1, 100), st.floats(1, 100))
def test_grants_stay_within_rate_burst_and_one_transfer(
    steps: list[tuple[float, int]], rate: float, burst: float
) -> None:
    bucket, now, grants = TokenBucket(rate, burst, 0.0), 0.0, []
    for pause, size in steps:
        now += pause
        if bucket.take(size, now):
            grants.append((now, size))
    for i, (start, _) in enumerate(grants):
        for j in range(i, len(grants)):
            granted = [size for _, size in grants[i : j + 1]]
            allowed = rate * (grants[j][0] - start) + burst + max(granted)
            assert sum(granted) <= allowed * (1 + 1e-9)


@given(asks, st.floats(1, 100), st.floats(1, 100))
def test_after_the_wait_it_names_the_bucket_grants_again(
    steps: list[tuple[float, int]], rate: float, burst: float
) -> None:
    bucket, now = TokenBucket(rate, burst, 0.0), 0.0
    for pause, size in steps:
        now += pause
        if not bucket.take(size, now):
            now += bucket.wait_s(now) + 1e-6
            assert bucket.take(size, now)


def test_an_idle_bucket_saves_no_more_than_its_burst() -> None:
    bucket = TokenBucket(10.0, 20.0, 0.0)
    assert bucket.take(20, 1000.0)
    assert not bucket.take(1, 1000.0)


def test_no_bound_grants_everything() -> None:
    bucket = TokenBucket(math.inf, 1.0, 0.0)
    assert all(bucket.take(10**12, 0.0) for _ in range(5))
    assert bucket.wait_s(0.0) == 0.0


@pytest.mark.parametrize(("rate", "burst"), [(0, 1), (1, 0), (-1, 1)])
def test_a_rate_or_burst_that_is_not_positive_is_refused(rate: float, burst: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        TokenBucket(rate, burst, 0.0)
