"""The circuit breaker, against the clock."""

from __future__ import annotations

from llmserve.kvstore.stores.breaker import Breaker


def opened(now_s: float = 0.0) -> Breaker:
    breaker = Breaker(failures=3, cool_down_s=1.0, longest_s=5.0)
    assert [breaker.failed(now_s) for _ in range(3)] == [False, False, True]
    return breaker


def test_single_failures_do_not_open_it() -> None:
    breaker = Breaker(failures=3)
    for _ in range(10):
        assert not breaker.failed(0.0)
        assert not breaker.failed(0.0)
        breaker.succeeded()
    assert breaker.allows(0.0)
    assert not breaker.is_open


def test_while_it_is_open_nothing_is_called_and_then_one_tries() -> None:
    breaker = opened()
    assert breaker.is_open
    assert not breaker.allows(0.9)
    assert breaker.allows(1.0)
    assert not breaker.allows(1.0)
    breaker.succeeded()
    assert breaker.allows(1.0)
    assert not breaker.is_open


def test_whether_it_would_allow_a_call_can_be_asked_without_taking_the_trial() -> None:
    breaker = opened()
    assert [breaker.would_allow(now_s) for now_s in (0.9, 1.0, 1.0)] == [False, True, True]
    assert breaker.allows(1.0)
    assert not breaker.would_allow(1.0)


def test_each_failed_trial_doubles_the_pause_up_to_its_longest() -> None:
    breaker, now_s, pauses = opened(), 0.0, []
    for _ in range(5):
        start_s = now_s
        while not breaker.allows(now_s):
            now_s += 0.25
        pauses.append(now_s - start_s)
        breaker.failed(now_s)
    assert pauses == [1.0, 2.0, 4.0, 5.0, 5.0]


def test_a_trial_that_never_ends_does_not_keep_it_open_for_ever() -> None:
    breaker = opened()
    assert breaker.allows(1.0)
    assert breaker.allows(2.0)
