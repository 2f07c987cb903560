"""The state machine of one request: what reaches the client is one run's output, or an error."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve.bus.messages import Reason
from llmserve.gateway.attempts import MAX_ATTEMPTS, Action, Attempts, Deliver, Discard, Fail, Mode, Submit, Withdraw

STOP = Reason.STOP


def kinds(actions: list[Action]) -> list[type]:
    return [type(action) for action in actions]


def test_tokens_are_delivered_as_they_come() -> None:
    machine = Attempts(Mode.RESUME, 10)
    assert machine.start() == Submit(0, 0)
    assert machine.delta(0, 0, [1, 2], None) == [Deliver(0, None)]
    assert machine.delta(0, 2, [3], STOP) == [Deliver(0, STOP)]
    assert machine.ended
    assert machine.tokens == [1, 2, 3]


def test_a_repeated_delta_delivers_only_its_new_tokens() -> None:
    machine = Attempts(Mode.RESUME, 10)
    machine.delta(0, 0, [1, 2], None)
    assert machine.delta(0, 0, [1, 2], None) == []
    assert machine.delta(0, 1, [2, 3], None) == [Deliver(1, None)]
    assert machine.tokens == [1, 2, 3]


def test_a_lost_plain_attempt_is_resumed_behind_its_tokens() -> None:
    machine = Attempts(Mode.RESUME, 10)
    machine.delta(0, 0, [1, 2], None)
    assert machine.lost(0, "killed") == [Submit(1, 2)]
    assert machine.delta(0, 2, [9], None) == []
    assert machine.delta(1, 2, [3], STOP) == [Deliver(0, STOP)]


def test_the_old_attempt_leaves_the_stream_once_the_new_one_is_stored() -> None:
    machine = Attempts(Mode.RESUME, 10)
    assert machine.stored(0, 7) == []
    assert machine.lost(0, "killed") == [Submit(1, 0)]
    assert machine.stored(1, 8) == [Discard(7)]


def test_an_attempt_whose_acknowledgement_comes_too_late_is_discarded() -> None:
    machine = Attempts(Mode.RESUME, 10)
    machine.lost(0, "killed")
    assert machine.stored(1, 8) == []
    assert machine.stored(0, 7) == [Discard(7)]
    machine.cancel()
    assert machine.stored(1, 9) == [Discard(9)]


def test_a_gap_counts_as_a_lost_attempt() -> None:
    machine = Attempts(Mode.RESUME, 10)
    machine.delta(0, 0, [1], None)
    assert machine.delta(0, 2, [3], None) == [Submit(1, 1)]


def test_a_replay_is_compared_and_its_known_tokens_are_dropped() -> None:
    machine = Attempts(Mode.REPLAY, 10)
    machine.delta(0, 0, [1, 2], None)
    assert machine.lost(0, "killed") == [Submit(1, 0)]
    assert machine.delta(1, 0, [1], None) == []
    assert machine.delta(1, 1, [2, 3], STOP) == [Deliver(1, STOP)]


@pytest.mark.parametrize(("tokens", "reason"), [([1, 9], None), ([1], STOP)])
def test_a_replay_that_differs_ends_in_an_error(tokens: list[int], reason: Reason | None) -> None:
    machine = Attempts(Mode.REPLAY, 10)
    machine.delta(0, 0, [1, 2], None)
    machine.lost(0, "killed")
    assert kinds(machine.delta(1, 0, tokens, reason)) == [Fail, Withdraw]


def test_a_random_stateful_request_is_repeated_only_before_its_first_token() -> None:
    machine = Attempts(Mode.ONCE, 10)
    assert machine.lost(0, "killed") == [Submit(1, 0)]
    machine.delta(1, 0, [1], None)
    assert kinds(machine.lost(1, "killed")) == [Fail, Withdraw]


def test_two_runs_of_one_attempt_are_both_shut_out() -> None:
    machine = Attempts(Mode.RESUME, 10)
    machine.delta(0, 0, [1, 2], None)
    assert machine.delta(0, 0, [5], None) == [Submit(1, 2)]
    assert machine.delta(0, 2, [3], None) == []


def test_the_last_attempt_that_is_lost_ends_the_request() -> None:
    machine = Attempts(Mode.RESUME, 10, max_attempts=3)
    assert kinds(machine.lost(0, "a")) == kinds(machine.lost(1, "b")) == [Submit]
    assert kinds(machine.lost(2, "c")) == [Fail, Withdraw]
    assert machine.lost(2, "c") == []


def test_attempts_that_were_lost_while_they_waited_do_not_count_as_tries() -> None:
    machine = Attempts(Mode.RESUME, 10, max_attempts=2)
    for number in range(5):
        assert kinds(machine.lost(number, "no decode worker was free", blameless=True)) == [Submit]
        machine.check()
    assert kinds(machine.lost(5, "killed")) == [Submit]
    assert kinds(machine.lost(6, "no decode worker was free", blameless=True)) == [Submit]
    assert kinds(machine.lost(7, "killed")) == [Fail, Withdraw]


def test_a_complete_output_whose_end_was_lost_is_not_repeated() -> None:
    machine = Attempts(Mode.RESUME, 2)
    machine.delta(0, 0, [1, 2], None)
    assert machine.lost(0, "killed") == [Deliver(0, Reason.LENGTH), Withdraw(None)]


def test_nothing_but_discards_follows_the_end() -> None:
    machine = Attempts(Mode.RESUME, 10)
    machine.stored(0, 4)
    assert machine.cancel() == [Withdraw(4)]
    late = [
        machine.cancel(),
        machine.delta(0, 0, [1], None),
        machine.lost(0, "x"),
        machine.expired(1),
        machine.rejected(0, "internal", "x"),
        machine.unstorable(0, "x"),
    ]
    assert late == [[]] * 6


def next_token(prefix: tuple[int, ...], run: int) -> int:
    """A token that tells the prefix it was sampled behind and the run that sampled it."""
    return random.Random(repr((prefix, run))).getrandbits(32)


@settings(max_examples=400, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    mode=st.sampled_from(list(Mode)),
    length=st.integers(1, 12),
    deterministic=st.booleans(),
    trouble=st.floats(0, 0.4),
)
def test_output_is_one_runs_however_deltas_are_lost_repeated_and_reordered(
    seed: int, mode: Mode, length: int, deterministic: bool, trouble: float
) -> None:
    rng = random.Random(seed)
    machine = Attempts(mode, length)
    delivered: list[int] = []
    failures = 0
    end: Reason | None = None
    # Each attempt's deltas wait in a queue of their own: in order within the attempt, in any order between attempts.
    queues: dict[int, list[tuple[int, list[int], Reason | None]]] = {}
    seq = 0

    def run(submit: Submit) -> None:
        prefix = tuple(machine.tokens[: submit.offset])
        deltas: list[tuple[int, list[int], Reason | None]] = []
        while len(prefix) < length:
            offset, tokens = len(prefix), []
            for _ in range(min(rng.randint(1, 3), length - len(prefix))):
                tokens.append(next_token(prefix, 0 if deterministic else submit.attempt))
                prefix = (*prefix, tokens[-1])
            delta = (offset, tokens, Reason.LENGTH if len(prefix) == length else None)
            deltas += [] if rng.random() < trouble / 2 else [delta] * (2 if rng.random() < trouble else 1)
        queues[submit.attempt] = deltas

    def apply(actions: list[Action], delta: tuple[int, list[int], Reason | None]) -> None:
        nonlocal failures, end, seq
        for action in actions:
            match action:
                case Deliver(skip, reason):
                    delivered.extend(delta[1][skip:])
                    end = reason
                case Submit():
                    run(action)
                    seq += 1
                    apply(machine.stored(action.attempt, seq), nothing)
                case Fail():
                    failures += 1
        machine.check()

    nothing: tuple[int, list[int], Reason | None] = (0, [], None)
    apply([machine.start()], nothing)
    while not machine.ended:
        waiting = [attempt for attempt, deltas in queues.items() if deltas]
        if not waiting or rng.random() < trouble / 4:
            apply(machine.lost(machine.attempt, "silent"), nothing)
            continue
        attempt = rng.choice(waiting)
        delta = queues[attempt].pop(0)
        apply(machine.delta(attempt, *delta), delta)

    assert delivered == machine.tokens
    runs = [0] if deterministic else range(MAX_ATTEMPTS)
    for index, token in enumerate(delivered):
        assert any(token == next_token(tuple(delivered[:index]), run) for run in runs)
    assert (end is not None) != (failures == 1)
    assert end is None or len(delivered) == length
