"""torch.distributed point-to-point: NCCL between GPUs, gloo between hosts without; one code path.

Each pair of engines makes two process groups of its own, one a direction, since NCCL runs what it is given in order.
vLLM's default group is not touched.
"""

from __future__ import annotations

import importlib.util
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING

import msgspec

from llmserve.kvstore.transfer.base import EngineOptions, TransferError
from llmserve.kvstore.transfer.lane import Lane, Op
from llmserve.kvstore.transfer.staged import StagedEngine
from llmserve.kvstore.transfer.staging import Slot

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup, TCPStore

_OPEN_S = 20.0
_MOVE_S = 30.0
"""After it gloo gives up what a hanging peer does not take; the engine's owner does so much earlier."""


def available(*, gpu: bool) -> str | None:
    """None, or why neither NCCL nor gloo can be used here."""
    if importlib.util.find_spec("torch") is None:
        return "package torch is not installed"
    import torch.distributed

    if not torch.distributed.is_available():
        return "this build of torch has no torch.distributed"
    if gpu and not torch.distributed.is_nccl_available():
        return "this build of torch has no NCCL"
    if not gpu and not torch.distributed.is_gloo_available():
        return "this build of torch has no gloo"
    return None


class _Info(msgspec.Struct, frozen=True, array_like=True):
    host: str
    store_port: int
    gpu_uuid: str


class _Ended(Op):
    """A transfer that a thread waits for: gloo tells its end to waiters only."""

    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def done(self) -> bool:
        if not self._future.done():
            return False
        if error := self._future.exception():
            raise TransferError(f"torch.distributed: {' '.join(str(error).split())[:300]}") from error
        return True


class _CollectiveLane(Lane):
    def __init__(self, store: TCPStore | None, info: _Info, lane_id: int, engine: CollectiveEngine) -> None:
        """``store``: this end's own if it was dialled, None to use the peer's."""
        self._rank = 0 if store is not None else 1
        self._engine, self._lane_id, self._info = engine, lane_id, info
        self._store = store
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix=f"{engine.name}-{way}") for way in ("to", "from")]
        self._opened: Future[list[ProcessGroup]] = self._threads[0].submit(self._open)
        self._groups: list[ProcessGroup] = []

    def _open(self) -> list[ProcessGroup]:
        import torch.distributed as dist

        wait = timedelta(seconds=_OPEN_S)
        store = self._store or dist.TCPStore(
            self._info.host, self._info.store_port, 2, False, wait, wait_for_workers=False, use_libuv=True
        )
        groups = [
            self._engine.group(dist.PrefixStore(f"{self._lane_id}/{way}", store), self._rank) for way in range(2)
        ]
        for way, group in enumerate(groups):
            # Connections are made by the first use.
            first = self._engine.tensor(1)
            work = (
                group.send([first], 1 - self._rank, 0)
                if way == self._rank
                else group.recv([first], 1 - self._rank, 0)
            )
            work.wait()
        return groups

    def ready(self) -> bool:
        if self._groups:
            return True
        if not self._opened.done():
            return False
        if error := self._opened.exception():
            raise TransferError(f"torch.distributed: {' '.join(str(error).split())[:300]}") from error
        self._groups = self._opened.result()
        return True

    def send(self, slot: Slot, size_bytes: int, tag: int) -> Op:
        group = self._groups[self._rank]
        return self._wait(0, group.send([self._engine.view(slot, size_bytes)], 1 - self._rank, tag))

    def receive(self, slot: Slot, size_bytes: int, tag: int) -> Op:
        group = self._groups[1 - self._rank]
        return self._wait(1, group.recv([self._engine.view(slot, size_bytes)], 1 - self._rank, tag))

    def _wait(self, thread: int, work: torch.distributed.Work) -> Op:
        return _Ended(self._threads[thread].submit(self._engine.finish, work))

    def close(self) -> None:
        for thread in self._threads:
            thread.shutdown(wait=False)
        for group in self._groups:
            self._engine.abort(group)
        self._groups = []


class CollectiveEngine(StagedEngine):
    """Named ``nccl`` or ``gloo`` by what carries the pages."""

    def __init__(self, options: EngineOptions) -> None:
        """Raises ``TransferError``."""
        import torch.distributed as dist

        self.name = "gloo" if options.gpu is None else "nccl"
        super().__init__(options)
        try:
            self._store = dist.TCPStore(
                options.host, 0, 2, True, timedelta(seconds=_OPEN_S), wait_for_workers=False, use_libuv=True
            )
        except Exception as error:
            super().close()
            raise TransferError(f"torch.distributed cannot open its store on {options.host}: {error}") from error

    def _info(self) -> bytes:
        import torch

        uuid = "" if self._gpu is None else str(torch.cuda.get_device_properties(self._gpu).uuid)
        return msgspec.msgpack.encode(_Info(self._host, self._store.port, uuid))

    def _open(self, lane_id: int, info: bytes, *, dialled: bool) -> Lane:
        try:
            theirs = msgspec.msgpack.decode(info, type=_Info)
            mine = msgspec.msgpack.decode(self._info(), type=_Info)
        except msgspec.MsgspecError as error:
            raise TransferError(f"not a description: {error}") from error
        if theirs.gpu_uuid and theirs.gpu_uuid == mine.gpu_uuid:
            raise TransferError("both ends are on one GPU, which NCCL refuses")
        return _CollectiveLane(None if dialled else self._store, theirs, lane_id, self)

    def group(self, store: torch.distributed.Store, rank: int) -> ProcessGroup:
        """A process group of two."""
        import torch
        import torch.distributed as dist

        if self._gpu is not None:
            torch.cuda.set_device(self._gpu)
            nccl = dist.ProcessGroupNCCL.Options()
            nccl._timeout = timedelta(seconds=_MOVE_S)
            return dist.ProcessGroupNCCL(store, rank, 2, nccl)
        gloo = dist.ProcessGroupGloo._Options()
        gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=self._host)]
        gloo._timeout = timedelta(seconds=_MOVE_S)
        return dist.ProcessGroupGloo(store, rank, 2, gloo)

    def tensor(self, size_bytes: int) -> torch.Tensor:
        import torch

        return torch.zeros(size_bytes, dtype=torch.uint8, device="cpu" if self._gpu is None else f"cuda:{self._gpu}")

    @staticmethod
    def view(slot: Slot, size_bytes: int) -> torch.Tensor:
        """The beginning of a staging buffer."""
        import torch

        buffer = slot.buffer if isinstance(slot.buffer, torch.Tensor) else torch.from_numpy(slot.buffer)
        return buffer[:size_bytes]

    def finish(self, work: torch.distributed.Work) -> None:
        """Wait, in a thread of its own."""
        import torch

        work.wait()
        if self._gpu is not None:
            # Waiting for NCCL only orders streams.
            torch.cuda.synchronize(self._gpu)

    def abort(self, group: ProcessGroup) -> None:
        if self._gpu is not None:
            group.abort()
