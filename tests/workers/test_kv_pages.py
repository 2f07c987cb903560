"""The kv role over real files and a real S3 server: what it lists, moves, tells, and survives."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from llmserve.bus.messages import KvResync, Tier
from llmserve.kvstore.codec import Codec, PageKind
from llmserve.kvstore.notices import Notice, NoticeKind, Notifier, socket_path
from llmserve.kvstore.stores.filesystem import FilesystemStore
from llmserve.kvstore.stores.s3 import S3Store
from tests.bus.samples import until
from tests.s3_servers import BUCKET, S3Server, s3_server
from tests.workers.keeping import GB, KIND, keeping, key, plant, with_folder


async def test_what_lies_there_is_listed_and_told_once_an_engine_can_read_it(tmp_path: Path) -> None:
    plant(tmp_path, [key(1), key(2, "t-b"), key(3, fingerprint="0" * 16)])
    async with keeping(with_folder(tmp_path)) as (keeper, bus):
        assert len(keeper.manager.pages(0)) == 3
        await asyncio.sleep(0.5)
        assert bus.told == []
        bus.engine_joins()
        await until(lambda: bus.held() == {(Tier.NVME, "host"): {key(1).block[-8:], key(2).block[-8:]}})
        assert {event.fingerprint for event in bus.told} == {KIND}
        assert {event.block_tokens for event in bus.told} == {16}


async def test_what_workers_store_and_remove_is_told_and_told_again_on_request(tmp_path: Path) -> None:
    plant(tmp_path, [key(1)])
    async with keeping(with_folder(tmp_path)) as (_, bus):
        bus.engine_joins()
        notifier = Notifier(socket_path(str(tmp_path)))
        for number in (2, 3):
            notifier.add(Notice(NoticeKind.STORED, "disk", key(number).path, 1000))
        notifier.add(Notice(NoticeKind.REMOVED, "disk", key(1).path))
        notifier.flush()
        wanted = {(Tier.NVME, "host"): {key(2).block[-8:], key(3).block[-8:]}}
        await until(lambda: bus.held() == wanted)
        bus.hear(bus.subjects.kv_resync("kv-1"), KvResync(router="r"))
        assert [event.snapshot for event in bus.told].count(True) == 1
        assert bus.held() == wanted


async def test_above_its_capacity_a_folder_loses_its_coldest_pages_of_the_noisy_tenant(tmp_path: Path) -> None:
    plant(tmp_path, [key(number, "t-a") for number in range(4)], age_s=500)
    plant(tmp_path, [key(10 + number, "t-b") for number in range(12)], age_s=400)
    made = with_folder(
        tmp_path, capacity=8500, eviction=f"hot_keep_secs: 60, tenant_hotset_gb: {{a: {4000 / GB:.12f}}}"
    )
    async with keeping(made) as (_, bus):
        bus.engine_joins()
        await until(lambda: len(list(tmp_path.rglob("*.kv"))) == 8)
        assert all((tmp_path / key(number, "t-a").path).exists() for number in range(4))
        await until(lambda: len(bus.held().get((Tier.NVME, "host"), ())) == 8)


async def test_after_a_restart_the_last_use_is_still_known(tmp_path: Path) -> None:
    plant(tmp_path, [key(1)], age_s=100)
    plant(tmp_path, [key(2)], age_s=2000)
    async with keeping(with_folder(tmp_path, eviction="evict_if_inactive_secs: 900")):
        await until(lambda: not (tmp_path / key(2).path).exists())
        assert (tmp_path / key(1).path).exists()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server("moto", tmp_path_factory.mktemp("moto")) as running:
        yield running


def s3_class(url: str, prefix: str) -> str:
    return (
        f", {{name: object, type: s3, bucket: {BUCKET}, region: us-east-1, prefix: {prefix}, timeout_s: 2, "
        f"endpoint_url: '{url}', prefetch_on_prefix: true}}"
    )


async def test_idle_pages_go_to_s3_and_those_that_follow_a_read_one_come_back(
    tmp_path: Path, server: S3Server
) -> None:
    plant(tmp_path, [key(number) for number in range(3)], age_s=600)
    more = s3_class(server.url, "demoted")
    made = with_folder(tmp_path, more=more, eviction="hot_keep_secs: 1, evict_if_inactive_secs: 500")
    store = S3Store("object", BUCKET, region="us-east-1", endpoint_url=server.url, prefix="demoted")
    async with keeping(made) as (keeper, bus):
        bus.engine_joins()
        notifier = Notifier(socket_path(str(tmp_path)))
        await until(lambda: not list(tmp_path.rglob("*.kv")))
        await until(lambda: len(keeper.manager.pages(1)) == 3)
        assert await store.read(key(0).path) == bytes(1000)

        for number in range(3):
            await store.write(key(number).path, b"page")
            parent = key(number - 1).block if number else b""
            notifier.add(Notice(NoticeKind.STORED, "object", key(number).path, 4, parent))
        notifier.add(Notice(NoticeKind.USED, "object", key(0).path))
        notifier.flush()
        await until(lambda: (tmp_path / key(1).path).exists() and (tmp_path / key(2).path).exists())
        assert (tmp_path / key(1).path).read_bytes() == b"page"
        assert not (tmp_path / key(0).path).exists()
        shorts = {key(number).block[-8:] for number in range(3)}
        await until(lambda: bus.held() == {(Tier.NVME, "host"): shorts - {key(0).block[-8:]}, (Tier.S3, ""): shorts})
    await store.close()


async def test_a_page_that_a_worker_stores_while_it_is_prefetched_is_gone_for_the_router_when_it_goes(
    tmp_path: Path, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    moving, goes_on, as_it_is = asyncio.Event(), asyncio.Event(), FilesystemStore.write

    async def write(self: FilesystemStore, path: str, data: bytes) -> None:
        moving.set()
        await goes_on.wait()
        await as_it_is(self, path, data)

    monkeypatch.setattr(FilesystemStore, "write", write)
    store = S3Store("object", BUCKET, region="us-east-1", endpoint_url=server.url, prefix="twice")
    await store.write(key(1).path, b"page")
    async with keeping(with_folder(tmp_path, more=s3_class(server.url, "twice"))) as (keeper, bus):
        bus.engine_joins()
        notifier = Notifier(socket_path(str(tmp_path)))

        def tell(kind: NoticeKind, tier: str, number: int, parent: bytes = b"") -> None:
            notifier.add(Notice(kind, tier, key(number).path, 4, parent))
            notifier.flush()

        tell(NoticeKind.STORED, "object", 0)
        tell(NoticeKind.STORED, "object", 1, key(0).block)
        tell(NoticeKind.USED, "object", 0)
        await until(moving.is_set)
        tell(NoticeKind.STORED, "disk", 1)
        await until(lambda: bus.held().get((Tier.NVME, "host")) == {key(1).block[-8:]})
        goes_on.set()
        await until((tmp_path / key(1).path).exists)
        await until(lambda: keeper.manager.pages(0).get(key(1).path) is not None)
        tell(NoticeKind.STORED, "disk", 2)
        await until(lambda: len(bus.held()[Tier.NVME, "host"]) == 2)
        tell(NoticeKind.REMOVED, "disk", 1)
        await until(lambda: bus.held()[Tier.NVME, "host"] == {key(2).block[-8:]})
    await store.close()


async def test_prefixes_that_are_older_than_the_kv_role_are_prefetched_too(tmp_path: Path, server: S3Server) -> None:
    """What a page follows stands in its header: nobody tells it."""
    codec = Codec(PageKind("bf16", 256, None), "raw")
    store = S3Store("object", BUCKET, region="us-east-1", endpoint_url=server.url, prefix="older")
    for number in range(3):
        parent = key(number - 1).block if number else b""
        await store.write(key(number).path, codec.encode(key(number), np.zeros(256, np.uint8), parent))
    made = with_folder(tmp_path, more=s3_class(server.url, "older"))
    async with keeping(made) as (keeper, _):
        notifier = Notifier(socket_path(str(tmp_path)))

        def asked_again() -> bool:
            notifier.add(Notice(NoticeKind.USED, "object", key(0).path))
            notifier.flush()
            return (tmp_path / key(1).path).exists() and (tmp_path / key(2).path).exists()

        await until(asked_again)
        assert not (tmp_path / key(0).path).exists()
        keeper.manager.check()
    await store.close()


async def test_while_s3_is_down_the_folder_is_kept_in_order_all_the_same(tmp_path: Path) -> None:
    plant(tmp_path, [key(number) for number in range(10)], age_s=400)
    made = with_folder(
        tmp_path, capacity=5500, more=s3_class("http://127.0.0.1:9", "x"), eviction="hot_keep_secs: 60"
    )
    async with keeping(made):
        await until(lambda: len(list(tmp_path.rglob("*.kv"))) == 5)


async def test_a_folder_that_cannot_be_used_stops_nothing(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    async with keeping(with_folder(blocked / "below")) as (keeper, _):
        assert len(keeper.manager.pages(0)) == 0


async def test_stores_of_the_worker_and_the_keeper_agree_on_paths(tmp_path: Path) -> None:
    store = FilesystemStore("disk", tmp_path)
    await store.write(key(7).path, b"page")
    async with keeping(with_folder(tmp_path)) as (keeper, _):
        assert list(keeper.manager.pages(0).keys()) == [key(7).path]
    await store.close()


@pytest.mark.parametrize("moment", ["before the copy counts", "before the original goes"])
async def test_killed_while_it_moves_a_page_it_loses_none(tmp_path: Path, moment: str) -> None:
    """The manager is a process that kills itself in the middle of moving pages from one folder to the next."""
    upper, lower = tmp_path / "upper", tmp_path / "lower"
    plant(upper, [key(number) for number in range(3)], age_s=600)
    patch = "os.rename" if moment == "before the copy counts" else "FilesystemStore._delete"
    script = f"""
import asyncio, os, signal
from prometheus_client import CollectorRegistry
from llmserve.kvstore.stores.filesystem import FilesystemStore
from llmserve.manifests.loader import parse
from llmserve.workers.kv_pages import PageKeeper
{patch} = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
text = '''metadata: {{name: d}}
spec:
  models: {{primary: {{id: m}}}}
  kv_cache: {{eviction: {{hot_keep_secs: 1, evict_if_inactive_secs: 500}}}}
  storageClasses:
  - {{name: upper, type: filesystem, path: {upper}}}
  - {{name: lower, type: filesystem, path: {lower}}}
'''
asyncio.run(PageKeeper(parse(text, "m"), None, "kv", "h", CollectorRegistry()).run())
"""
    ended = await asyncio.create_subprocess_exec(sys.executable, "-c", script)
    assert await ended.wait() == -9
    store = FilesystemStore("disk", upper)
    assert [await store.read(key(number).path) for number in range(3)] == [bytes(1000)] * 3
    await store.close()
    copies = [path for path in lower.rglob("*.kv") if path.is_file()]
    assert bool(copies) == (moment == "before the original goes")
    assert all(path.read_bytes() == bytes(1000) for path in copies)
