"""The KV events of an engine core in another process, from vLLM's own publisher."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from llmserve.workers.engine import vllm_process
from llmserve.workers.engine.base import EngineError
from llmserve.workers.engine.vllm_core import Unheard
from llmserve.workers.engine.vllm_process import ProcessCore
from llmserve.workers.engine.vllm_subscription import KvSubscription
from tests.bus.samples import until

if TYPE_CHECKING:
    from vllm.config.kv_events import KVEventsConfig
    from vllm.distributed.kv_events import ZmqEventPublisher

pytestmark = pytest.mark.vllm


@pytest.fixture
def config(tmp_path: Path) -> KVEventsConfig:
    from vllm.config.kv_events import KVEventsConfig

    return KVEventsConfig(enable_kv_cache_events=True, publisher="zmq", endpoint=f"ipc://{tmp_path}/events")


@pytest.fixture
def subscription(config: KVEventsConfig) -> Iterator[KvSubscription]:
    made = KvSubscription(config)
    yield made
    made.close()


def publisher(config: KVEventsConfig) -> ZmqEventPublisher:
    from vllm.distributed.kv_events import ZmqEventPublisher

    return ZmqEventPublisher(0, endpoint=config.endpoint, hwm=config.hwm, topic=config.topic)


async def test_the_first_batch_of_a_core_that_starts_later_arrives(
    config: KVEventsConfig, subscription: KvSubscription
) -> None:
    from vllm.distributed.kv_events import AllBlocksCleared, KVEventBatch

    await asyncio.sleep(0.25)
    core = publisher(config)
    try:
        await subscription.connected()
        for ts in (1.0, 2.0):
            core.publish(KVEventBatch(ts=ts, events=[AllBlocksCleared()]))
        batches = subscription.batches()
        async with asyncio.timeout(5):
            assert [(await anext(batches)).ts for _ in range(2)] == [1.0, 2.0]
    finally:
        core.shutdown()


async def test_a_core_that_tells_nothing_is_an_error(subscription: KvSubscription) -> None:
    with pytest.raises(EngineError, match="tells nothing of its pages"):
        await subscription.connected(timeout_s=0.3)


async def test_after_events_that_cannot_be_taken_in_the_later_ones_are_and_the_worker_knows(
    config: KVEventsConfig, subscription: KvSubscription, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.distributed.kv_events import AllBlocksCleared, KVEventBatch

    monkeypatch.setattr(vllm_process, "_LISTEN_AGAIN_S", 0.01)
    heard: list[object] = []

    def sink(said: object) -> None:
        heard.append(said)
        if len(heard) == 1:
            raise ZeroDivisionError("a defect")

    core = publisher(config)
    listening = asyncio.create_task(ProcessCore(None, fork=False)._hear(subscription, sink))
    try:
        await subscription.connected()
        for ts in (1.0, 2.0):
            core.publish(KVEventBatch(ts=ts, events=[AllBlocksCleared()]))
        await until(lambda: len(heard) == 3)
        assert isinstance(heard[1], Unheard)
        assert isinstance(heard[2], KVEventBatch)
        assert heard[2].ts == 2.0
    finally:
        listening.cancel()
        core.shutdown()
