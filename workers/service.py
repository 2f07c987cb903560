"""One replica of a worker role: engine and worker together, started again when the engine dies."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import time

from llmserve.bus.base import Bus
from llmserve.bus.cache_salt import CacheSalts
from llmserve.bus.messages import Role
from llmserve.bus.subjects import is_token
from llmserve.manifests.schema import Manifest
from llmserve.workers.engine import EngineMode, make_engine
from llmserve.workers.engine.base import EngineError, EngineInfo
from llmserve.workers.engine.watched import EngineStalled, WatchedEngine
from llmserve.workers.metrics import WorkerMetrics
from llmserve.workers.reports import Identity
from llmserve.workers.worker import Worker, WorkerDied, WorkerSettings

logger = logging.getLogger(__name__)

BACKOFF_S = (1.0, 30.0)
_STABLE_S = 60.0
"""A worker that served for so long starts again without delay."""


class WorkerService:
    """``start``, then ``run`` until ``stop``. Every engine that it starts is a new member of the deployment."""

    def __init__(
        self,
        manifest: Manifest,
        role: Role,
        bus: Bus,
        name: str,
        metrics: WorkerMetrics,
        *,
        engine_mode: EngineMode = "auto",
        engines_here: int | None = None,
        host: str = "127.0.0.1",
        gpus: tuple[str, ...] = (),
        metrics_port: int = 0,
        restart: bool = False,
    ) -> None:
        if not is_token(name) or len(name) > 50:
            raise ValueError(f"worker name {name!r} is not 1 to 50 letters, digits, '_' and '-'")
        self.info: EngineInfo | None = None
        self._manifest = manifest
        self._role = role
        self._bus = bus
        self._name = name
        self._metrics = metrics.of(name, role)
        self._engine_mode = engine_mode
        self._engines_here = engines_here
        self._host = host
        self._gpus = gpus
        self._metrics_port = metrics_port
        self._restart = restart
        self._worker: Worker | None = None

    @property
    def alive(self) -> bool:
        """Whether it serves."""
        return self._worker is not None and self._worker.alive

    async def start(self) -> EngineInfo:
        """Start the engine and join. Raises ``EngineError`` or ``BusError``, one line each."""
        engine = await asyncio.to_thread(
            make_engine,
            self._manifest,
            self._role,
            self._engine_mode,
            engines_here=self._engines_here,
            host=self._host,
            gpus=self._gpus,
        )
        engine = WatchedEngine(engine, self._manifest.spec.engine.stall_s)
        identity = Identity(
            member=f"{self._name}-{secrets.token_hex(4)}",
            role=self._role,
            host=socket.gethostname(),
            pid=os.getpid(),
            metrics_port=self._metrics_port,
        )
        manifest = self._manifest
        settings = WorkerSettings(
            lease_s=manifest.spec.transfer.lease_s,
            salts=CacheSalts(manifest.metadata.name, manifest.spec.security.cache_sharing),
        )
        worker = Worker(self._bus, engine, identity, settings, self._metrics)
        try:
            self.info = await worker.start()
        except BaseException:
            await worker.stop()
            raise
        self._worker = worker
        return self.info

    async def run(self) -> None:
        """Serve until ``stop``. Raises ``WorkerDied``, unless dead engines are to be started again."""
        backoff_s = BACKOFF_S[0]
        while self._worker is not None:
            began_s = time.monotonic()
            try:
                await self._worker.run()
                return
            except WorkerDied as error:
                if isinstance(error.__cause__, EngineStalled):
                    self._metrics.stalled()
                await self._worker.stop()
                if not self._restart:
                    raise
                logger.error("worker %s: %s", self._name, error)
            if time.monotonic() - began_s > _STABLE_S:
                backoff_s = BACKOFF_S[0]
            backoff_s = await self._start_again(backoff_s)

    async def stop(self, drain_s: float = 0.0) -> None:
        """Leave; running work may end within ``drain_s``. Never raises."""
        worker = self._worker
        if worker is None:
            return
        if drain_s > 0:
            await worker.drain(drain_s)
        await worker.stop()

    async def _start_again(self, backoff_s: float) -> float:
        """Returns the pause before the next restart."""
        while True:
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, BACKOFF_S[1])
            try:
                await self.start()
            except EngineError as error:
                logger.error("worker %s: its engine does not start: %s", self._name, error)
                continue
            self._metrics.restarted()
            logger.warning("worker %s: engine started again", self._name)
            return backoff_s
