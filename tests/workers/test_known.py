"""What a worker knows of the pages below DRAM, by given times."""

from __future__ import annotations

from llmserve.workers.offload.known import KnownPages

PAGE = ("t-a", b"page")
OTHER = ("t-a", b"other")


def test_a_page_that_could_not_be_loaded_is_missing_for_a_while_though_its_class_says_that_it_has_it() -> None:
    known = KnownPages()
    assert known.look(PAGE, "r", 0.0) is None
    assert known.questions() == [[PAGE]]
    known.lost([PAGE], 0.0)
    known.answer([PAGE], 1, 0.1)
    assert known.look(PAGE, "r", 4.9) is False
    assert known.look(PAGE, "r", 5.1) is None
    known.answer([PAGE], 1, 5.2)
    assert known.look(PAGE, "r", 5.3) is True


def test_a_page_that_could_not_be_loaded_is_lost_until_it_is_written_anew() -> None:
    known = KnownPages()
    known.written(PAGE)
    assert not known.is_lost(PAGE)
    known.lost([PAGE], 0.0)
    known.answer([PAGE], 1, 100.0)
    assert known.is_lost(PAGE)
    known.written(PAGE)
    assert not known.is_lost(PAGE)
    assert known.look(PAGE, "r", 0.1) is True


def test_a_page_that_was_missing_is_asked_for_again_soon() -> None:
    known = KnownPages()
    for page in (PAGE, OTHER):
        assert known.look(page, "r", 0.0) is None
    known.answer([PAGE, OTHER], 1, 0.0)
    assert [known.look(page, "r", 0.4) for page in (PAGE, OTHER)] == [True, False]
    assert known.look(OTHER, "r", 0.6) is None
