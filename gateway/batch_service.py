"""Everything for requests that nobody waits for, in one gateway: files, batches, direct publishing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from fastapi import FastAPI
from starlette.types import ASGIApp

from llmserve.bus.base import BusError
from llmserve.bus.nats import NatsBus
from llmserve.bus.streams import ensure_batch_streams
from llmserve.gateway.access import Access
from llmserve.gateway.batch_api import install_batch_routes
from llmserve.gateway.batch_runner import BatchRunner
from llmserve.gateway.batch_store import BatchStore
from llmserve.gateway.executor import Executor
from llmserve.gateway.metrics import GatewayMetrics
from llmserve.gateway.submissions import Submissions
from llmserve.manifests.schema import Manifest

log = logging.getLogger(__name__)


class BatchService:
    """``start`` makes the streams and begins to take work."""

    def __init__(
        self,
        manifest: Manifest,
        bus: NatsBus,
        member_id: str,
        app: FastAPI,
        front: ASGIApp,
        access: Access,
        metrics: GatewayMetrics,
    ) -> None:
        """``app`` gets the routes of files and batches, ``front`` answers the requests in them."""
        self._bus = bus
        self._tenants = _tenants(manifest)
        concurrency = manifest.spec.gateway.batch.concurrency
        store = BatchStore(bus.jetstream, bus.subjects)
        executor = Executor(front, access.may_use_model, access.limits.of, metrics)
        self._runner = BatchRunner(store, executor, member_id, metrics, concurrency)
        self._submissions = Submissions(bus.connection, bus.jetstream, bus.subjects, store, executor, concurrency)
        self._changing: asyncio.Task[None] | None = None
        install_batch_routes(app, store, self._runner)

    async def start(self) -> None:
        """Raises ``BusError``."""
        await self._ensure(self._tenants)
        # The server may be a new one, or have lost what was not on its disk.
        self._bus.on_reconnect(self._ensure_again)
        await self._submissions.start(self._tenants)
        self._runner.start()

    async def stop(self) -> None:
        """Leave what runs to other gateways."""
        if self._changing is not None:
            self._changing.cancel()
        await self._runner.stop()
        await self._submissions.stop()

    def change(self, manifest: Manifest) -> None:
        """Take the requests of tenants that are new in ``manifest`` as well."""
        self._tenants = _tenants(manifest)
        self._changing = asyncio.create_task(self._take_new())

    async def _take_new(self) -> None:
        await self._ensure_again()
        try:
            await self._submissions.start(self._tenants)
        except BusError as error:
            log.error("new tenants cannot publish before the next reload: %s", error)

    async def _ensure(self, tenants: Iterable[str]) -> None:
        settings = self._bus.connection.settings
        await ensure_batch_streams(self._bus.jetstream, self._bus.subjects, settings, tenants)

    async def _ensure_again(self) -> None:
        try:
            await self._ensure(self._tenants)
        except BusError as error:
            log.error("the streams for batches are not there: %s", error)


def _tenants(manifest: Manifest) -> list[str]:
    return sorted(manifest.spec.scheduling.fair_share.tenants)
