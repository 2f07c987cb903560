"""Decisions of the ladder."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llmserve.kvstore.transfer.ladder import COOL_DOWN_MAX_S, COOL_DOWN_S, Ladder, Rung, rungs

A, B = Rung("same_host", "pull"), Rung("nixl", "pull")
A_PUSH, B_PUSH = Rung("same_host", "push"), Rung("nixl", "push")
MB = 1 << 20


def ladder() -> Ladder:
    return Ladder(rungs(["same_host", "nixl"]))


def probed(*speeds: tuple[Rung, float]) -> Ladder:
    """With megabytes a second."""
    made = ladder()
    for rung, speed in speeds:
        made.probed(rung, int(speed * MB), 1.0)
    return made


def test_before_anything_is_measured_the_order_decides() -> None:
    assert ladder().choose(0.0) == A
    assert ladder().choose(0.0, {A}) == B


def test_every_rung_is_probed_once() -> None:
    assert set(ladder().due(0.0)) == {A, B, A_PUSH, B_PUSH}
    assert probed((A, 1), (B, 1), (A_PUSH, 1), (B_PUSH, 1)).due(0.0) == []


def test_the_fastest_measured_rung_is_used_whatever_the_order() -> None:
    assert probed((A, 100), (B, 200)).choose(0.0) == B
    assert probed((A, 0.5), (B_PUSH, 169)).choose(0.0) == B_PUSH


def test_a_push_has_to_be_clearly_faster() -> None:
    assert probed((A, 100), (A_PUSH, 120)).choose(0.0) == A
    assert probed((A, 100), (A_PUSH, 130)).choose(0.0) == A_PUSH


def test_a_failed_rung_cools_down_and_comes_back() -> None:
    made = probed((A, 200), (B, 100))
    assert made.failed(A, 10.0) == COOL_DOWN_S
    assert made.choose(10.0) == B
    assert made.choose(10.0 + COOL_DOWN_S) == A


def test_the_cool_down_doubles_with_each_failure_in_a_row_up_to_a_bound() -> None:
    made = ladder()
    waits = [made.failed(A, 0.0) for _ in range(10)]
    assert waits[:3] == [COOL_DOWN_S, 2 * COOL_DOWN_S, 4 * COOL_DOWN_S]
    assert waits[-1] == COOL_DOWN_MAX_S
    made.moved(A, MB, 1.0)
    assert made.failed(A, 0.0) == COOL_DOWN_S


def test_nothing_is_left_when_all_are_tried_or_cool_down() -> None:
    made = ladder()
    made.failed(A, 0.0)
    assert made.choose(0.0, {B, A_PUSH, B_PUSH}) is None


def test_a_rung_that_cools_down_is_not_probed() -> None:
    made = ladder()
    made.failed(B, 0.0)
    assert B not in made.due(0.0)
    assert B in made.due(COOL_DOWN_S)


def test_a_speed_below_half_of_what_was_measured_makes_probes_due() -> None:
    made = probed((A, 100), (B, 60), (A_PUSH, 1), (B_PUSH, 1))
    assert [made.moved(A, 4 * MB, 4 / 40) for _ in range(3)] == [False, False, True]
    assert set(made.due(0.0)) == {A, B, A_PUSH, B_PUSH}


def test_one_slow_transfer_or_many_small_ones_do_not() -> None:
    made = probed((A, 100), (B, 60), (A_PUSH, 1), (B_PUSH, 1))
    for _ in range(5):
        assert not made.moved(A, 4 * MB, 4 / 40)
        assert not made.moved(A, 4 * MB, 4 / 100)
        assert not made.moved(A, 1000, 1.0)
    assert made.due(0.0) == []


def test_a_rung_that_became_slow_loses_its_place_even_before_it_is_probed_anew() -> None:
    made = probed((A, 100), (B, 80))
    for _ in range(4):
        made.moved(A, 4 * MB, 4 / 40)
    assert made.choose(0.0) == B


@given(
    st.lists(
        st.tuples(st.sampled_from([A, B, A_PUSH, B_PUSH]), st.sampled_from(["ok", "fail", "probe"]), st.floats(0, 50))
    )
)
def test_what_is_chosen_is_never_cooling_down(events: list[tuple[Rung, str, float]]) -> None:
    made, now_s, until_s = ladder(), 0.0, dict.fromkeys([A, B, A_PUSH, B_PUSH], 0.0)
    for rung, event, pause_s in events:
        now_s += pause_s
        if event == "ok":
            made.moved(rung, 2 * MB, 0.01)
        elif event == "probe":
            made.probed(rung, MB, 0.01)
        else:
            until_s[rung] = now_s + made.failed(rung, now_s)
        chosen = made.choose(now_s)
        free = [r for r, end_s in until_s.items() if end_s <= now_s]
        assert (chosen in free) if free else chosen is None
