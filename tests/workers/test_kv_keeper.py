"""What the kv role's keeper does at once, what waits for what, and what it goes on after."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from llmserve.bus.base import BusError
from llmserve.bus.messages import KvResync, Tier
from llmserve.kvstore import listings
from llmserve.kvstore.codec import BadPage
from llmserve.kvstore.notices import Notice, NoticeKind, Notifier, socket_path
from llmserve.kvstore.stores.base import Stored, StoreError
from llmserve.kvstore.stores.filesystem import FilesystemStore
from llmserve.workers import kv_lineage
from llmserve.workers.kv_moves import PAGES_AT_ONCE
from tests.bus.samples import until
from tests.workers.keeping import FakeBus, keeping, key, plant, with_folder

IDLE = "hot_keep_secs: 1, evict_if_inactive_secs: 500"
HERE = (Tier.NVME, "host")


def below(folder: Path) -> str:
    """A second class."""
    return f", {{name: lower, type: filesystem, path: {folder}}}"


def tell(folder: Path, kind: NoticeKind, number: int, tier: str = "disk", parent: bytes = b"") -> None:
    notifier = Notifier(socket_path(str(folder)))
    notifier.add(Notice(kind, tier, key(number).path, 1000, parent))
    notifier.close()


def knows(bus: FakeBus, *numbers: int) -> bool:
    return bus.held().get(HERE, set()) == {key(number).block[-8:] for number in numbers}


@pytest.fixture
def slow_lower(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """The class ``lower`` is listed once this is set."""
    goes_on, as_it_is = asyncio.Event(), FilesystemStore.listing

    async def listing(self: FilesystemStore, prefix: str) -> AsyncIterator[list[Stored]]:
        if self.name == "lower":
            await goes_on.wait()
        async for batch in as_it_is(self, prefix):
            yield batch

    monkeypatch.setattr(FilesystemStore, "listing", listing)
    return goes_on


async def test_a_class_that_is_slow_to_list_keeps_nothing_else_waiting(
    tmp_path: Path, slow_lower: asyncio.Event
) -> None:
    upper, lower = tmp_path / "upper", tmp_path / "lower"
    plant(upper, [key(1)], age_s=600)
    async with keeping(with_folder(upper, more=below(lower), eviction=IDLE), ready=False) as (keeper, bus):
        bus.engine_joins()
        await until(lambda: (lower / key(1).path).exists() and not (upper / key(1).path).exists())
        tell(upper, NoticeKind.STORED, 2)
        await until(lambda: knows(bus, 1, 2))
        assert not keeper.ready.is_set()
        slow_lower.set()
        await until(keeper.ready.is_set)
        assert knows(bus, 1, 2)


async def test_only_a_few_pages_are_in_memory_at_once_and_the_rounds_do_not_wait_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on, as_it_is, in_memory = asyncio.Event(), FilesystemStore.write, set[str]()
    most = 0

    async def write(self: FilesystemStore, path: str, data: bytes) -> None:
        nonlocal most
        in_memory.add(path)
        most = max(most, len(in_memory))
        await goes_on.wait()
        await as_it_is(self, path, data)
        in_memory.discard(path)

    monkeypatch.setattr(FilesystemStore, "write", write)
    upper, lower = tmp_path / "upper", tmp_path / "lower"
    plant(upper, [key(number) for number in range(30)], age_s=600)
    async with keeping(with_folder(upper, more=below(lower), eviction=IDLE)) as (_, bus):
        bus.engine_joins()
        await until(lambda: len(in_memory) == PAGES_AT_ONCE)
        tell(upper, NoticeKind.STORED, 100)
        await until(lambda: key(100).block[-8:] in bus.held().get(HERE, set()))
        goes_on.set()
        await until(lambda: len(list(lower.rglob("*.kv"))) == 30)
        assert most == PAGES_AT_ONCE


async def test_others_have_their_turn_while_a_listing_is_taken_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listings, "SLICE_PAGES", 10)
    plant(tmp_path, [key(number) for number in range(200)])
    async with keeping(with_folder(tmp_path), ready=False) as (keeper, _):
        sizes = {0}
        while not keeper.ready.is_set():
            sizes.add(len(keeper.manager.pages(0)))
            await asyncio.sleep(0)
        assert sizes == set(range(0, 201, 10))


async def test_a_class_that_cannot_delete_keeps_no_other_from_evicting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_it_is = FilesystemStore.delete

    async def delete(self: FilesystemStore, paths: Sequence[str]) -> None:
        if self.name == "disk":
            raise StoreError("disk: refused")
        await as_it_is(self, paths)

    monkeypatch.setattr(FilesystemStore, "delete", delete)
    upper, lower = tmp_path / "upper", tmp_path / "lower"
    plant(upper, [key(number) for number in range(300)], age_s=600)
    plant(lower, [key(number) for number in range(1000, 1010)], age_s=600)
    async with keeping(with_folder(upper, more=below(lower), eviction=IDLE)):
        await until(lambda: not [number for number in range(1000, 1010) if (lower / key(number).path).exists()])
        assert len(list(upper.rglob("*.kv"))) == 300


async def test_a_defect_while_a_page_is_moved_costs_one_try_and_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    as_it_is, tries = FilesystemStore.delete, 0

    async def delete(self: FilesystemStore, paths: Sequence[str]) -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise ZeroDivisionError("a defect")
        await as_it_is(self, paths)

    monkeypatch.setattr(FilesystemStore, "delete", delete)
    plant(tmp_path, [key(1)], age_s=600)
    registry = CollectorRegistry()
    async with keeping(with_folder(tmp_path, eviction=IDLE), registry=registry):
        await until(lambda: not (tmp_path / key(1).path).exists())
    assert registry.get_sample_value("llmserve_storage_failures_total", {"tier": "disk"}) == 1
    assert [record for record in caplog.records if record.exc_info and key(1).path in record.getMessage()]


async def test_after_a_defect_while_headers_are_read_the_others_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    async def head(self: FilesystemStore, path: str, size_bytes: int) -> bytes | None:
        read.append(path)
        raise ZeroDivisionError("a defect") if len(read) == 1 else BadPage("none")

    monkeypatch.setattr(FilesystemStore, "head", head)
    monkeypatch.setattr(kv_lineage, "_AT_ONCE", 1)
    plant(tmp_path, [key(number) for number in range(3)])
    made = with_folder(tmp_path / "none", more=f"{below(tmp_path)[:-1]}, prefetch_on_prefix: true}}")
    registry = CollectorRegistry()
    async with keeping(made, registry=registry):
        await until(lambda: len(read) == 3)
    assert registry.get_sample_value("llmserve_storage_errors_total", {"what": "lineage"}) == 1


async def test_a_router_that_asks_while_the_bus_is_gone_gets_everything_when_it_asks_again(tmp_path: Path) -> None:
    plant(tmp_path, [key(1)])
    registry = CollectorRegistry()
    async with keeping(with_folder(tmp_path), registry=registry) as (_, bus):
        bus.engine_joins()
        await until(lambda: knows(bus, 1))
        bus.gone = BusError("gone")
        bus.hear(bus.subjects.kv_resync("kv-1"), KvResync(router="r"))
        assert registry.get_sample_value("llmserve_storage_errors_total", {"what": "publish"}) == 1
        bus.gone = None
        bus.hear(bus.subjects.kv_resync("kv-1"), KvResync(router="r"))
        assert bus.told[-1].snapshot
        assert bus.told[-1].seq == bus.told[0].seq + 2, "the router sees that a message is missing"
