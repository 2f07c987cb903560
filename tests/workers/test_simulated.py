"""The simulated engine: tokens, batching, pages and handoffs."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from llmserve.bus.messages import Reason, Stage
from llmserve.workers.engine.base import EngineError, EngineOutput, Step, Transfer, Work
from llmserve.workers.engine.simulated import SimulatedEngine
from llmserve.workers.engine.simulated_batch import Scheduler
from llmserve.workers.engine.simulated_sequence import FIRST_TOKEN_ID, TOKEN_IDS, Limits, Phase
from llmserve.workers.engine.wire import decode_body
from tests.workers.world import body, expected, settings


class Driver:
    """An engine and what it yielded."""

    def __init__(self, engine: SimulatedEngine) -> None:
        self.engine = engine
        self.tokens: dict[str, list[int]] = defaultdict(list)
        self.last: dict[str, EngineOutput] = {}
        self.outputs: list[EngineOutput] = []
        self.released: list[str] = []
        self.transfers: list[Transfer] = []
        self.prefill_tokens = 0

    async def step(self) -> Step:
        step = await asyncio.wait_for(self.engine.step(), 10)
        self.engine.scheduler.check()
        for output in step.outputs:
            self.tokens[output.work_id] += output.tokens
            self.last[output.work_id] = output
        self.outputs += step.outputs
        self.released += step.released
        self.transfers += step.transfers
        self.prefill_tokens += step.prefill_tokens
        return step

    async def until_ended(self, *work_ids: str) -> None:
        while not all(w in self.last and (self.last[w].reason or self.last[w].handoff) for w in work_ids):
            await self.step()


async def opened(**options: object) -> Driver:
    engine = SimulatedEngine(settings(**options))  # type: ignore[arg-type]
    await engine.start()
    return Driver(engine)


def work(
    work_id: str, prompt: list[int], stage: Stage = Stage.WHOLE, max_tokens: int | None = 8, **more: object
) -> Work:
    sampling = {key: more.pop(key) for key in ("stop_token_ids", "min_tokens") if key in more}
    return Work(work_id, stage, body(prompt, max_tokens, **sampling), **more)  # type: ignore[arg-type]


PROMPT = list(range(1, 41))


async def test_tokens_are_a_function_of_all_tokens_before() -> None:
    driver = await opened()
    driver.engine.submit(work("a", PROMPT))
    driver.engine.submit(work("b", [*PROMPT, *expected(PROMPT, 3)], max_tokens=5))
    await driver.until_ended("a", "b")
    assert driver.tokens["a"] == expected(PROMPT, 8)
    assert driver.tokens["b"] == expected(PROMPT, 8)[3:]
    await driver.engine.close()


@hypothesis_settings(deadline=None)
@given(st.lists(st.integers(0, 49_000), min_size=1, max_size=50))
def test_tokens_stay_inside_the_vocabulary_and_off_the_special_ids(prompt: list[int]) -> None:
    assert all(FIRST_TOKEN_ID <= token < FIRST_TOKEN_ID + TOKEN_IDS <= 40_000 for token in expected(prompt, 5))


async def test_output_ends_at_max_tokens_with_length() -> None:
    driver = await opened()
    driver.engine.submit(work("a", PROMPT, max_tokens=3))
    await driver.until_ended("a")
    assert (len(driver.tokens["a"]), driver.last["a"].reason) == (3, Reason.LENGTH)
    await driver.engine.close()


async def test_output_ends_at_the_models_length_if_nothing_else_bounds_it() -> None:
    driver = await opened(pages=64)
    driver.engine.submit(work("a", [5] * 1000, max_tokens=None))
    await driver.until_ended("a")
    assert (len(driver.tokens["a"]), driver.last["a"].reason) == (24, Reason.LENGTH)
    await driver.engine.close()


async def test_a_stop_token_ends_the_output_and_is_its_reason() -> None:
    driver, stop = await opened(), expected(PROMPT, 8)[4]
    driver.engine.submit(work("a", PROMPT, stop_token_ids=[stop]))
    await driver.until_ended("a")
    assert driver.tokens["a"] == expected(PROMPT, 5)
    assert (driver.last["a"].reason, driver.last["a"].stop_reason) == (Reason.STOP, stop)
    await driver.engine.close()


async def test_no_stop_token_is_sampled_before_min_tokens() -> None:
    driver, stop = await opened(), expected(PROMPT, 1)[0]
    driver.engine.submit(work("a", PROMPT, stop_token_ids=[stop], min_tokens=2, max_tokens=4))
    await driver.until_ended("a")
    assert stop not in driver.tokens["a"][:2]
    await driver.engine.close()


async def test_a_prompt_longer_than_a_step_is_prefilled_in_chunks() -> None:
    driver = await opened(step_tokens=64)
    driver.engine.submit(work("a", [7] * 200, max_tokens=1))
    steps = []
    while "a" not in driver.last:
        steps.append((await driver.step()).prefill_tokens)
    assert steps == [64, 64, 64, 8]
    assert driver.last["a"].computed_tokens == 200
    await driver.engine.close()


async def test_a_decoding_request_goes_on_while_a_long_prompt_is_prefilled() -> None:
    driver = await opened(step_tokens=64)
    driver.engine.submit(work("short", PROMPT, max_tokens=20))
    await driver.step()
    driver.engine.submit(work("long", [7] * 600, max_tokens=1))
    await driver.until_ended("long")
    assert len(driver.tokens["short"]) >= 9
    await driver.engine.close()


async def test_more_requests_than_slots_wait_and_all_end() -> None:
    driver = await opened(slots=2)
    ids = [str(k) for k in range(7)]
    for k in ids:
        driver.engine.submit(work(k, [int(k) + 1] * 20))
    await driver.step()
    assert driver.engine.load().running == 2
    assert driver.engine.load().waiting == 5
    await driver.until_ended(*ids)
    assert all(driver.tokens[k] == expected([int(k) + 1] * 20, 8) for k in ids)
    await driver.engine.close()


async def test_when_pages_run_out_the_newest_is_preempted_and_its_output_is_the_same() -> None:
    driver = await opened(pages=8, slots=4)
    for k in "abcd":
        driver.engine.submit(work(k, [ord(k)] * 20, max_tokens=40))
    await driver.until_ended(*"abcd")
    assert driver.engine.scheduler.preemptions > 0
    assert all(driver.tokens[k] == expected([ord(k)] * 20, 40) for k in "abcd")
    assert driver.engine.load().pages_free == 8
    await driver.engine.close()


async def test_what_can_never_fit_is_refused_at_once() -> None:
    driver = await opened(pages=4)
    with pytest.raises(EngineError, match="pages"):
        driver.engine.submit(work("a", [1] * 60, max_tokens=60))
    with pytest.raises(EngineError, match="1023"):
        driver.engine.submit(work("b", [1] * 1024))
    await driver.engine.close()


async def test_abort_frees_the_pages_at_each_stage() -> None:
    driver = await opened(slots=1, step_tokens=64)
    engine = driver.engine
    engine.submit(work("running", PROMPT, max_tokens=500))
    engine.submit(work("waiting", PROMPT))
    await driver.step()
    engine.abort(["waiting", "running", "unknown"])
    await driver.until_ended("waiting", "running")
    assert {driver.last[k].reason for k in ("waiting", "running")} == {Reason.CANCELLED}
    engine.submit(work("held", PROMPT, Stage.PREFILL))
    await driver.until_ended("held")
    assert engine.load().pages_free == 64 - 3
    engine.abort(["held"])
    await driver.step()
    assert driver.released == ["held"]
    assert engine.load().pages_free == 64
    await engine.close()


async def handoff_of(driver: Driver, prompt: list[int] = PROMPT, **more: object) -> EngineOutput:
    driver.engine.submit(work("p", prompt, Stage.PREFILL, **more))  # type: ignore[arg-type]
    await driver.until_ended("p")
    return driver.last["p"]


async def test_decode_after_a_handoff_continues_the_same_output_without_prefill() -> None:
    p, d = await opened(), await opened()
    handed = await handoff_of(p)
    assert (handed.tokens, handed.pages) == (expected(PROMPT, 1), 3)
    d.engine.submit(work("d", PROMPT, Stage.DECODE, first_tokens=tuple(handed.tokens), handoff=handed.handoff))
    await d.until_ended("d")
    assert handed.tokens + d.tokens["d"] == expected(PROMPT, 8)
    assert d.prefill_tokens == 0
    assert next(output for output in d.outputs).computed_tokens == 0
    assert [(t.failure, t.bytes_moved) for t in d.transfers] == [("", 3 * d.engine.settings.page_bytes)]
    await p.step()
    assert p.released == ["p"]
    assert p.engine.load().pages_free == 64
    await asyncio.gather(p.engine.close(), d.engine.close())


async def test_a_whole_output_decode_samples_the_first_token_again() -> None:
    p, d = await opened(), await opened()
    handed = await handoff_of(p, whole_output=True)
    d.engine.submit(work("d", PROMPT, Stage.DECODE, whole_output=True, handoff=handed.handoff))
    await d.until_ended("d")
    assert d.tokens["d"] == expected(PROMPT, 8)
    assert d.outputs[0].computed_tokens == 1
    await asyncio.gather(p.engine.close(), d.engine.close())


async def test_a_prefill_that_ends_at_its_first_token_is_not_handed_off() -> None:
    p = await opened()
    ended = await handoff_of(p, max_tokens=1)
    assert (ended.reason, ended.handoff) == (Reason.LENGTH, b"")
    assert p.engine.load().pages_free == 64
    await p.engine.close()


async def recomputed(d: Driver, handed: EngineOutput, failure: str) -> None:
    d.engine.submit(work("d", PROMPT, Stage.DECODE, first_tokens=tuple(handed.tokens), handoff=handed.handoff))
    await d.until_ended("d")
    assert handed.tokens + d.tokens["d"] == expected(PROMPT, 8)
    assert d.prefill_tokens == len(PROMPT)
    assert [(t.failure, t.bytes_moved) for t in d.transfers] == [(failure, 0)]


async def test_pages_of_an_expired_lease_are_freed_and_a_late_reader_computes_them() -> None:
    p, d = await opened(lease_s=0.05), await opened()
    handed = await handoff_of(p)
    while not p.released:
        await p.step()
    assert p.engine.load().pages_free == 64
    await recomputed(d, handed, "stale")
    await asyncio.gather(p.engine.close(), d.engine.close())


async def test_a_reader_of_released_pages_computes_them() -> None:
    p, d = await opened(), await opened()
    handed = await handoff_of(p)
    p.engine.abort(["p"])
    await recomputed(d, handed, "stale")
    await asyncio.gather(p.engine.close(), d.engine.close())


async def test_a_reader_of_a_dead_engines_pages_computes_them() -> None:
    p, d = await opened(), await opened()
    handed = await handoff_of(p)
    await p.engine.close()
    await recomputed(d, handed, "peer")
    await d.engine.close()


async def test_a_reader_whose_owner_is_silent_computes_after_the_timeout() -> None:
    p, d = await opened(), await opened()
    handed = await handoff_of(p)

    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(mute, "127.0.0.1", 0)
    from msgspec import msgpack

    params = msgpack.decode(handed.handoff)
    params[2] = server.sockets[0].getsockname()[1]
    silent = EngineOutput("p", handed.tokens, handoff=msgpack.encode(params))
    await recomputed(d, silent, "timeout")
    server.close()
    await asyncio.gather(p.engine.close(), d.engine.close())


async def test_pages_of_another_kind_are_not_taken() -> None:
    from dataclasses import replace

    p = await opened()
    other = SimulatedEngine(replace(settings(), page_bytes=1))
    await other.start()
    await recomputed(Driver(other), await handoff_of(p), "fingerprint")
    await asyncio.gather(p.engine.close(), other.close())


async def test_an_abort_during_the_transfer_frees_the_pages() -> None:
    from dataclasses import replace

    from tests.workers.world import FAST

    p = await opened()
    handed = await handoff_of(p)
    d = await opened(timing=replace(FAST, transfer_bits_per_s=8e6))
    d.engine.submit(work("d", PROMPT, Stage.DECODE, first_tokens=tuple(handed.tokens), handoff=handed.handoff))
    stepping = asyncio.create_task(d.step())
    await asyncio.sleep(0.02)
    assert d.engine.load().pages_free < 64
    d.engine.abort(["d"])
    await stepping
    assert d.last["d"].reason is Reason.CANCELLED
    assert d.engine.load().pages_free == 64
    await asyncio.gather(p.engine.close(), d.engine.close())


@hypothesis_settings(deadline=None)
@given(st.integers(0, 2**32), st.booleans(), st.sampled_from([None, 20]))
def test_no_history_of_requests_loses_a_page_or_starves_a_request(
    seed: int, chunked: bool, long_prompt_tokens: int | None
) -> None:
    rng = random.Random(seed)
    limits = Limits(
        slots=rng.randint(1, 4),
        step_tokens=rng.randint(8, 64),
        pages=12,
        page_tokens=8,
        max_model_len=96,
        chunked=chunked,
        long_prompt_tokens=long_prompt_tokens,
    )
    scheduler = Scheduler(limits)
    outputs: dict[str, list[int]] = defaultdict(list)
    prompts: dict[str, list[int]] = {}
    counts: dict[str, int] = {}
    gone: set[str] = set()
    for k in range(rng.randint(1, 12)):
        name = str(k)
        prompts[name], counts[name] = [rng.randint(0, 9) for _ in range(rng.randint(1, 60))], rng.randint(1, 30)
        stage = rng.choice([Stage.WHOLE, Stage.PREFILL])
        scheduler.add(name, stage, decode_body(body(prompts[name], counts[name])), handoff=rng.choice([b"", b"h"]))
    for _ in range(3000):
        if not scheduler.sequences:
            break
        batch = scheduler.schedule()
        scheduler.check()
        for sequence in batch.loads:
            scheduler.loaded(sequence, ok=rng.random() < 0.5)
        for output in scheduler.complete(batch):
            outputs[output.work_id] += output.tokens
        scheduler.check()
        for name, sequence in list(scheduler.sequences.items()):
            if sequence.phase is Phase.HELD:
                scheduler.release(name)
            elif rng.random() < 0.005:
                scheduler.abort(name)
                gone.add(name)
        scheduler.check()
    assert not scheduler.sequences
    assert scheduler.pages_free == limits.pages
    for name, tokens in outputs.items():
        assert tokens == expected(prompts[name], len(tokens))
        assert name in gone or len(tokens) in (1, min(counts[name], 96 - len(prompts[name])))
