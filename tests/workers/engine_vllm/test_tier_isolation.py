"""A tenant tries to reach another's pages in a real engine: through the API, and as one who writes into the stores.

The tenants' hashes are not salted here, so that the spy knows them; what keeps the tenants apart is below.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
import xxhash

from llmserve.kvstore.codec import HEADER_BYTES
from llmserve.kvstore.keys import PageKey
from tests.s3_servers import BUCKET
from tests.workers.engine_vllm.kept import BLOCK, PAGES, WHEN_ASKED_FOR, Kept

pytestmark = [pytest.mark.vllm, WHEN_ASKED_FOR]


@pytest.mark.parametrize(
    "wish", [{}, {"space": "t-a"}, {"space": "t-a", "kv_load_tiers": ["PageTier"]}], ids=["same", "named", "tiers"]
)
async def test_the_same_prompt_of_another_tenant_is_computed_whatever_its_body_asks_for(
    kept: Kept, wish: dict[str, object]
) -> None:
    """A publisher of one's own writes the body as it likes; the tenant is the subject's."""
    prompt, answer = await kept.kept(f"Asked for {wish}")
    spied = await kept.ask(prompt, tenant="spy", extra_args={"kv_transfer_params": wish})
    assert (spied.first.cached_tokens, spied.tokens) == (0, answer)
    own = await kept.ask(prompt)
    assert (own.first.cached_tokens, own.tokens) == (PAGES * BLOCK, answer)


def copied(data: bytes, key: PageKey) -> bytes:
    return data


def forged(data: bytes, key: PageKey) -> bytes:
    """With the checksum that the page would have under the other name: it is no secret."""
    head, payload = data[: HEADER_BYTES - 8], data[HEADER_BYTES:]
    digest = xxhash.xxh3_64(head + key.identity() + payload).intdigest()
    return head + struct.pack("<Q", digest) + payload


@pytest.mark.parametrize("place", ["folder", "bucket"])
@pytest.mark.parametrize("how", [copied, forged])
async def test_anothers_pages_under_ones_own_name_are_of_no_use(
    kept: Kept, how: Callable[[bytes, PageKey], bytes], place: str
) -> None:
    prompt, answer = await kept.kept(f"Pages {how.__name__} in the {place}")
    for theirs, key in zip(kept.files(prompt), kept.keys(prompt, "spy"), strict=True):
        data = how(theirs.read_bytes(), key)
        if place == "bucket":
            kept.bucket.put_object(Bucket=BUCKET, Key=key.path, Body=data)
        else:
            (kept.folder / key.path).parent.mkdir(parents=True, exist_ok=True)
            (kept.folder / key.path).write_bytes(data)
    tier = "object" if place == "bucket" else "disk"
    bad = kept.counted(tier, "bad")
    spied = await kept.ask(prompt, tenant="spy")
    assert (spied.first.cached_tokens, spied.tokens) == (0, answer)
    await kept.until(lambda: kept.counted(tier, "bad") > bad, "it was seen")
    await kept.leave_dram()
    own = await kept.ask(prompt)
    assert (own.first.cached_tokens, own.tokens) == (PAGES * BLOCK, answer)


async def test_pages_of_ones_own_in_another_order_are_of_no_use_either(kept: Kept) -> None:
    prompt, answer = await kept.kept("Pages of another block")
    first, second, *_ = kept.files(prompt)
    first.write_bytes(second.read_bytes())
    ended = await kept.ask(prompt)
    assert (ended.first.cached_tokens, ended.tokens) == (0, answer)
