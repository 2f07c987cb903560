"""A real engine's prefix cache: it names pages as a gateway does, tells of them, and keeps tenants apart."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from llmserve.bus.block_hashes import short_hashes, unpack_short
from llmserve.bus.cache_salt import CacheSalts, request_salt
from llmserve.bus.messages import Role, Stage, Tier
from llmserve.workers.kv_feed import KvFeed
from tests.workers.engine_vllm.driver import Driver, body

pytestmark = pytest.mark.vllm
Prompt = Callable[..., list[int]]

BLOCK = 32
KV_GB, DRAM_GB = 0.0125, 0.027
SALTS = CacheSalts("test", {"friends": ["ann", "bob"]})


@pytest.fixture(scope="module")
async def caching() -> AsyncIterator[Driver]:
    driver = await Driver.open(
        Role.BOTH, "process", prefix_caching=True, kv_space_gb=KV_GB, dram_gb=DRAM_GB, block_tokens=BLOCK
    )
    yield driver
    await driver.close()


def told(driver: Driver, tier: Tier = Tier.GPU) -> frozenset[int]:
    """What the engine holds by all that it has told."""
    feed = KvFeed("w", "f", BLOCK, "h")
    feed.change(driver.kv)
    return feed.held(tier)


def hashes(tokens: list[int], salt: str = "") -> set[int]:
    return set(unpack_short(short_hashes(tokens, BLOCK, salt)))


async def test_pages_have_the_hashes_that_a_gateway_computes_plain_and_salted(
    caching: Driver, prompt: Prompt
) -> None:
    assert caching.info.page_tokens == BLOCK
    tokens = prompt(333, "Hashes.")
    plain = await caching.run(Stage.WHOLE, body(tokens, 40))
    salted = await caching.run(Stage.WHOLE, body(tokens, 40, cache_salt="mine"), owner_salt=SALTS.owner("acme"))
    expected = hashes([*tokens, *plain.tokens[:-1]])
    expected |= hashes([*tokens, *salted.tokens[:-1]], SALTS.worker_salt("acme", "mine"))
    await caching.until(lambda: told(caching) >= expected, "all full blocks are told")
    assert told(caching) == expected
    assert len(expected) == 2 * ((333 + 39) // BLOCK)


async def test_a_resubmission_of_prompt_and_tokens_finds_the_pages_of_the_first_attempt(
    caching: Driver, prompt: Prompt
) -> None:
    tokens, owner = prompt(200, "Resubmitted."), SALTS.owner("acme")
    first = await caching.run(Stage.WHOLE, body(tokens, 60), owner_salt=owner)
    again = [*tokens, *first.tokens[:50]]
    salt = SALTS.worker_salt("acme", None)
    await caching.until(lambda: hashes(again, salt) <= told(caching), "its pages are told")
    second = await caching.run(Stage.WHOLE, body(again, 10), owner_salt=owner)
    assert second.first.cached_tokens == len(again) // BLOCK * BLOCK
    assert second.tokens == first.tokens[50:]


@pytest.mark.parametrize("guess", ["none", "same", "owner", "pages"])
async def test_no_tenant_hits_anothers_pages_whatever_salt_its_body_names(
    caching: Driver, prompt: Prompt, guess: str
) -> None:
    tokens = prompt(161, f"Secret of ann, {guess}.")
    theirs = request_salt(SALTS.owner("ann"), None)
    data = body(tokens, 2, cache_salt=theirs)
    for cached in (0, 160):
        own = await caching.run(Stage.WHOLE, data, owner_salt=SALTS.owner("ann"))
        assert own.first.cached_tokens == cached
    guesses = {
        "none": None,
        "same": theirs,
        "owner": SALTS.owner("ann").hex(),
        "pages": SALTS.worker_salt("ann", theirs),
    }
    spied = await caching.run(Stage.WHOLE, body(tokens, 2, cache_salt=guesses[guess]), owner_salt=SALTS.owner("eve"))
    assert (spied.first.cached_tokens, spied.first.computed_tokens) == (0, 161)


async def test_tenants_of_one_group_share_pages(caching: Driver, prompt: Prompt) -> None:
    data = body(prompt(161, "Shared."), 2)
    await caching.run(Stage.WHOLE, data, owner_salt=SALTS.owner("ann"))
    shared = await caching.run(Stage.WHOLE, data, owner_salt=SALTS.owner("bob"))
    assert shared.first.cached_tokens == 160


async def test_evicted_pages_are_told_and_what_is_told_is_there_for_their_owner_alone(
    caching: Driver, prompt: Prompt
) -> None:
    """In its own memory, and in DRAM, which holds more."""
    first, eve = prompt(641, "Page 0."), SALTS.owner("eve")
    ann: dict[str, Any] = {"tenant": "ann", "owner_salt": SALTS.owner("ann")}
    pages_salt = SALTS.worker_salt("ann", None)
    names = hashes(first, pages_salt)
    await caching.run(Stage.WHOLE, body(first, 1), **ann)
    await caching.until(lambda: names <= told(caching), "its pages are told")
    await caching.until(lambda: names <= told(caching, Tier.DRAM), "that they are in DRAM too")
    # Prompts of so many pages that none of the first one's has room beside them.
    for number in range(caching.info.pages_total // (1500 // BLOCK) + 1):
        kept = prompt(1500, f"Page {number + 1}.")
        await caching.run(Stage.WHOLE, body(kept, 1))
    await caching.until(lambda: hashes(kept) <= told(caching), "the last prompt's pages are told")
    await caching.until(lambda: not names & told(caching), "the first one's are told to be gone")
    assert len(told(caching)) <= caching.info.pages_total
    again = await caching.run(Stage.WHOLE, body(kept, 1))
    assert (again.first.cached_tokens, again.first.loaded_tokens) == (1500 // BLOCK * BLOCK, 0)

    assert names <= told(caching, Tier.DRAM)
    for guess in (None, pages_salt):
        spy = body(first[:97], 1, cache_salt=guess, extra_args={"kv_transfer_params": {"space": "t-ann"}})
        spied = await caching.run(Stage.WHOLE, spy, tenant="eve", owner_salt=eve)
        assert (spied.first.cached_tokens, spied.first.loaded_tokens) == (0, 0)
    loaded = await caching.run(Stage.WHOLE, body(first, 1), **ann)
    assert (loaded.first.cached_tokens, loaded.first.loaded_tokens) == (640, 640)
    for number in range(2):
        await caching.run(Stage.WHOLE, body(prompt(1500, f"More {number}."), 1))
    pages = DRAM_GB * 2**30 // caching.info.page_bytes
    await caching.until(lambda: len(told(caching, Tier.DRAM)) <= pages, "no more is told than DRAM has room for")
