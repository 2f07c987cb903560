"""What every store does alike: files, and objects on two servers that know nothing of each other."""

from __future__ import annotations

import asyncio
import time

import pytest

from llmserve.kvstore.stores.base import PageStore, Stored, StoreError
from tests.kvstore.stores.conftest import s3_store
from tests.s3_servers import S3Server

PATHS = [f"v1/f/all/t-a/{n:02x}/{n:02x}{'0' * 62}.0.kv" for n in range(6)]


async def listed(store: PageStore, prefix: str = "v1/") -> dict[str, Stored]:
    return {item.path: item async for batch in store.listing(prefix) for item in batch}


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 1_500_003])
async def test_what_is_written_is_read(store: PageStore, size: int) -> None:
    data = bytes(range(251)) * (size // 251 + 1)
    await store.write(PATHS[0], data[:size])
    assert await store.read(PATHS[0]) == data[:size]


async def test_what_was_never_written_is_none(store: PageStore) -> None:
    assert await store.read(PATHS[0]) is None
    assert await store.contains(PATHS) == 0
    assert await listed(store) == {}
    await store.delete(PATHS)
    await store.touch(PATHS)


async def test_the_last_write_counts(store: PageStore) -> None:
    await store.write(PATHS[0], b"long" * 5000)
    await store.write(PATHS[0], b"short")
    assert await store.read(PATHS[0]) == b"short"


async def test_a_prefix_is_known_up_to_its_first_gap(store: PageStore) -> None:
    for path in (*PATHS[:2], PATHS[3]):
        await store.write(path, b"x")
    assert await store.contains(PATHS) == 2
    assert await store.contains(PATHS[3:]) == 1
    assert await store.contains([]) == 0


async def test_a_prefix_of_many_pages_is_known_up_to_its_first_gap_within_a_deadline_too(store: PageStore) -> None:
    many = 50 if store.shared else 200
    paths = [f"v1/f/all/t-a/{n:04x}" for n in range(many)]
    gap = many - 10
    assert await store.contains_within(paths, 20.0) == 0
    await asyncio.gather(*(store.write(path, b"") for path in paths[:gap] + paths[gap + 1 :]))
    assert await store.contains(paths) == gap
    assert await store.contains_within(paths, 20.0) == gap
    assert await store.contains_within(paths[:gap], 20.0) == gap
    assert await store.contains_within([], 20.0) == 0


async def test_many_objects_at_once(store: PageStore) -> None:
    await asyncio.gather(*(store.write(path, path.encode()) for path in PATHS * 4))
    assert await asyncio.gather(*(store.read(path) for path in PATHS)) == [path.encode() for path in PATHS]


async def test_a_listing_has_sizes_and_times_and_keeps_to_its_prefix(store: PageStore) -> None:
    for size, path in enumerate(PATHS):
        await store.write(path, bytes(size))
    await store.write("v1/other/all/t-a/00/00.0.kv", b"x")
    found = await listed(store, "v1/f/")
    assert {path: item.size_bytes for path, item in found.items()} == {p: n for n, p in enumerate(PATHS)}
    assert all(abs(item.used_s - time.time()) < 60 for item in found.values())


async def test_what_is_deleted_is_gone(store: PageStore) -> None:
    for path in PATHS:
        await store.write(path, b"x")
    await store.delete(PATHS[1:])
    assert list(await listed(store)) == PATHS[:1]
    assert await store.read(PATHS[1]) is None


async def test_touching_renews_the_time_of_last_use_and_nothing_else(
    store: PageStore, request: pytest.FixtureRequest
) -> None:
    await store.write(PATHS[0], b"data")
    before = (await listed(store))[PATHS[0]].used_s
    await asyncio.sleep(1.1)
    await store.touch(PATHS[:1])
    # s3rver keeps the time when an object is copied onto itself; S3 and moto renew it.
    keeps = request.node.callspec.params["store"] == "s3rver"
    assert (await listed(store))[PATHS[0]].used_s > before - keeps
    assert await store.read(PATHS[0]) == b"data"


async def test_large_objects_go_in_parts(server: S3Server) -> None:
    store = s3_store(server, part_bytes=5 * 2**20)
    data = bytes(range(256)) * (13 * 4096)
    try:
        await store.write(PATHS[0], data)
        assert await store.read(PATHS[0]) == data
    finally:
        await store.close()


async def test_a_listing_of_more_than_one_answer_is_whole(server: S3Server) -> None:
    store = s3_store(server, list_batch=4)
    paths = [f"v1/f/all/t-a/{n:04x}" for n in range(11)]
    try:
        await asyncio.gather(*(store.write(path, b"") for path in paths))
        assert sorted(await listed(store)) == paths
        await store.delete(paths)
        assert await listed(store) == {}
    finally:
        await store.close()


async def test_a_bucket_that_is_not_there_is_an_error_and_not_a_missing_page(server: S3Server) -> None:
    from llmserve.kvstore.stores.s3 import S3Store

    store = S3Store("object", "nobucket", region="us-east-1", endpoint_url=server.url)
    try:
        with pytest.raises(StoreError, match="object: NoSuchBucket"):
            await store.read(PATHS[0])
    finally:
        await store.close()
