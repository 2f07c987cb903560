"""The simulated engine's prefix cache: what is found again, what is evicted, and what is told about it."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from llmserve.bus.block_hashes import short_hashes, unpack_short
from llmserve.bus.messages import Stage, Tier
from llmserve.workers.engine.base import EngineOutput
from llmserve.workers.engine.simulated_batch import Scheduler
from llmserve.workers.engine.simulated_pages import PagePool
from llmserve.workers.engine.simulated_sequence import Limits, Phase
from llmserve.workers.engine.wire import decode_body
from llmserve.workers.kv_feed import KvFeed
from tests.workers.world import body, expected

PAGE = 4
PROMPT = list(range(1, 19))


class Run:
    """A scheduler with a prefix cache, stepped until all is done, and a mirror of what it told."""

    def __init__(self, pages: int = 64, *, prefix_cache: bool = True, dram_pages: int = 0) -> None:
        limits = Limits(
            slots=4,
            step_tokens=16,
            pages=pages,
            page_tokens=PAGE,
            max_model_len=200,
            prefix_cache=prefix_cache,
            dram_pages=dram_pages,
        )
        self.scheduler = Scheduler(limits)
        self.mirror = KvFeed("w", "f", PAGE, "h")
        self.tokens: dict[str, list[int]] = {}
        self.first: dict[str, EngineOutput] = {}

    def add(self, name: str, prompt: list[int], output: int = 3, salt: str = "", stage: Stage = Stage.WHOLE) -> None:
        self.scheduler.add(name, stage, decode_body(body(prompt, output)), cache_salt=salt)

    def step(self) -> None:
        batch = self.scheduler.schedule()
        for sequence in batch.loads:
            self.scheduler.loaded(sequence, ok=True)
        for output in self.scheduler.complete(batch):
            self.first.setdefault(output.work_id, output)
            self.tokens.setdefault(output.work_id, []).extend(output.tokens)
        self.mirror.change(self.scheduler.pool.changes())
        self.scheduler.check()
        assert len(self.mirror.held(Tier.GPU)) == self.scheduler.pool.named

    def run(self) -> None:
        while self.scheduler.running or self.scheduler.waiting:
            self.step()

    def cached(self, name: str) -> int | None:
        return self.first[name].cached_tokens


def test_a_prompt_served_before_is_computed_from_its_last_full_page_on() -> None:
    run = Run()
    for name, prompt in (("a", PROMPT), ("b", PROMPT), ("c", PROMPT[:16]), ("d", [*PROMPT[:9], 7, 7, 7, 7])):
        run.add(name, prompt)
        run.run()
    assert [run.cached(name) for name in "abcd"] == [0, 16, 12, 8]
    assert [run.first[name].computed_tokens for name in "abcd"] == [18, 2, 4, 5]
    assert run.tokens["b"] == run.tokens["a"] == expected(PROMPT, 3)


def test_output_is_found_again_by_the_next_turn() -> None:
    run = Run()
    run.add("a", PROMPT, 8)
    run.run()
    run.add("b", [*PROMPT, *run.tokens["a"], 5])
    run.run()
    # The last token of an output is never computed.
    assert run.cached("b") == (18 + 7) // PAGE * PAGE


def test_no_salt_finds_what_another_has_left() -> None:
    run = Run()
    for name, salt in (("a", "one"), ("b", "two"), ("c", "one")):
        run.add(name, PROMPT, salt=salt)
        run.run()
    assert [run.cached(name) for name in "abc"] == [0, 0, 16]


def test_pages_are_told_by_the_hashes_that_a_gateway_computes() -> None:
    run = Run()
    run.add("a", PROMPT, 8, salt="s")
    run.run()
    told = run.mirror.held(Tier.GPU)
    assert told == set(unpack_short(short_hashes([*PROMPT, *run.tokens["a"][:-1]], PAGE, "s")))


def test_what_was_left_first_is_evicted_first_its_tail_before_its_head() -> None:
    run = Run(pages=12)
    run.add("a", PROMPT)
    run.run()
    run.add("b", [50 + token for token in PROMPT])
    run.run()
    run.add("c", [90 + token for token in PROMPT])
    run.run()
    told = run.mirror.held(Tier.GPU)
    first = unpack_short(short_hashes(PROMPT, PAGE, ""))
    assert told & set(first) == set(first[:2])
    run.add("d", PROMPT)
    run.run()
    assert run.cached("d") == 2 * PAGE


def test_without_a_prefix_cache_nothing_is_found_or_told() -> None:
    run = Run(prefix_cache=False)
    for name in "ab":
        run.add(name, PROMPT)
        run.run()
    assert run.cached("b") == 0
    assert not run.mirror.held(Tier.GPU)


def test_pages_held_for_a_handoff_can_be_shared_and_stay_when_it_is_over() -> None:
    run = Run()
    run.add("a", PROMPT, stage=Stage.PREFILL)
    run.run()
    assert run.scheduler.sequences["a"].phase is Phase.HELD
    run.add("b", PROMPT)
    run.run()
    assert run.scheduler.release("a")
    run.scheduler.check()
    run.add("c", PROMPT)
    run.run()
    assert (run.cached("b"), run.cached("c")) == (16, 16)


@hypothesis_settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.integers(14, 40))
def test_a_cache_changes_no_token_and_loses_no_page(seed: int, pages: int) -> None:
    rng = random.Random(seed)
    run = Run(pages, dram_pages=rng.choice((0, 5, 50)))
    prompts: dict[str, list[int]] = {}
    for number in range(25):
        prompt = [rng.choice((1, 2))] * rng.choice((4, 9, 16)) + [
            rng.randrange(3) for _ in range(rng.randrange(1, 8))
        ]
        run.add(f"r{number}", prompt, rng.randrange(1, 12), salt=rng.choice(("", "s")))
        prompts[f"r{number}"] = prompt
        for _ in range(rng.randrange(4)):
            run.step()
        if rng.random() < 0.1:
            gone = rng.choice(list(prompts))
            run.scheduler.abort(gone)
            run.scheduler.check()
            prompts.pop(gone)
    run.run()
    for name, prompt in prompts.items():
        assert run.tokens[name] == expected(prompt, len(run.tokens[name]))
    assert run.scheduler.pages_free == pages


@pytest.mark.parametrize("told", [True, False])
def test_a_page_computed_twice_is_kept_once(told: bool) -> None:
    pool = PagePool(4)
    pool.take((), 2)
    assert pool.name(7)
    if told:
        assert len(pool.changes()) == 1
    assert not pool.name(7)
    pool.leave([7, 7], 0)
    pool.check()
    assert (pool.free, pool.named) == (4, 1)


def test_what_is_evicted_goes_to_the_tier_and_is_loaded_from_it_again() -> None:
    run = Run(pages=12, dram_pages=100)
    for name, first in (("a", 0), ("b", 50), ("c", 90)):
        run.add(name, [first + token for token in PROMPT])
        run.run()
    hashes = unpack_short(short_hashes(PROMPT, PAGE, ""))
    assert run.mirror.held(Tier.DRAM) >= set(hashes[2:])
    run.add("d", PROMPT)
    run.run()
    assert (run.cached("d"), run.first["d"].loaded_tokens) == (16, 8)
    assert run.tokens["d"] == run.tokens["a"]


def test_a_full_tier_forgets_what_was_evicted_first() -> None:
    pool = PagePool(1, dram_pages=2)
    for number in range(1, 6):
        pool.take((), 1)
        pool.name(number)
        pool.leave([number], 0)
        pool.check()
    told = KvFeed("w", "f", PAGE, "h")
    told.change(pool.changes())
    assert [set(told.held(tier)) for tier in (Tier.GPU, Tier.DRAM)] == [{5}, {3, 4}]
