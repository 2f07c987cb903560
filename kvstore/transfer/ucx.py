"""UCX through ucxx: staged chunks as tagged messages between two endpoints.

ucxx offers Python no remote memory access, so that both ends take part; see ``staged``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING

from llmserve.kvstore.transfer.base import EngineOptions, TransferError
from llmserve.kvstore.transfer.lane import Lane, Op
from llmserve.kvstore.transfer.staged import StagedEngine
from llmserve.kvstore.transfer.staging import Slot

if TYPE_CHECKING:
    from ucxx._lib.arr import Array
    from ucxx._lib.libucxx import UCXEndpoint, UCXRequest, UCXWorker

_TAG_BITS = 32
_NO_RDMA = "^ib"
"""UCX's alias for all transports over InfiniBand and RoCE."""
_OLD_PROTOCOLS = {"PROTO_ENABLE": "n"}
"""When a peer dies amid a large message, the new ones of UCX 1.21 withdraw the keys that it has got of this process's
memory, and end the process where there is no registration cache, as over TCP alone
(``ucs_rcache_region_invalidate``). They ended it with GPU memory too."""


def available() -> str | None:
    """None, or why UCX cannot be used here."""
    if importlib.util.find_spec("ucxx") is None:
        return "package ucxx is not installed"
    try:
        from ucxx._lib import libucxx  # noqa: F401
    except (ImportError, OSError) as error:
        return f"package ucxx cannot be loaded: {error}"
    return None


class _UcxOp(Op):
    def __init__(self, request: UCXRequest) -> None:
        self._request = request

    def done(self) -> bool:
        if not self._request.completed:
            return False
        try:
            self._request.check_error()
        except Exception as error:
            raise TransferError(f"UCX: {error!r}") from error
        return True


class _UcxLane(Lane):
    def __init__(self, worker: UCXWorker, lane_id: int, address: bytes, *, dialled: bool) -> None:
        from ucxx._lib.libucxx import UCXAddress

        self._lane_id, self._dialled = lane_id, dialled
        try:
            there = UCXAddress.create_from_buffer(address)
            self._endpoint: UCXEndpoint = worker.create_endpoint_from_worker_address(
                there, endpoint_error_handling=True
            )
        except Exception as error:
            raise TransferError(f"UCX cannot reach the peer: {error!r}") from error

    def ready(self) -> bool:
        if not self._endpoint.alive:
            raise TransferError("UCX has lost the peer")
        return True

    def _tag(self, tag: int, *, to_dialler: bool) -> object:
        from ucxx._lib.libucxx import UCXXTag

        return UCXXTag((self._lane_id << _TAG_BITS) | (2 * tag + to_dialler) % (1 << _TAG_BITS))

    def send(self, slot: Slot, size_bytes: int, tag: int) -> Op:
        return self._post(self._endpoint.tag_send, slot, size_bytes, self._tag(tag, to_dialler=not self._dialled))

    def receive(self, slot: Slot, size_bytes: int, tag: int) -> Op:
        return self._post(self._endpoint.tag_recv, slot, size_bytes, self._tag(tag, to_dialler=self._dialled))

    @staticmethod
    def _post(call: Callable[[Array, object], UCXRequest], slot: Slot, size_bytes: int, tag: object) -> Op:
        from ucxx._lib.arr import Array

        try:
            return _UcxOp(call(Array(slot.buffer[:size_bytes]), tag))  # type: ignore[index]
        except Exception as error:
            raise TransferError(f"UCX: {error!r}") from error

    def close(self) -> None:
        # Not ``close()``: that one waits for a peer that may be dead, and a second one meanwhile ends the process.
        self._endpoint.close_blocking()


class UcxEngine(StagedEngine):
    """One UCX worker, driven by its owner's calls."""

    name = "ucx"

    def __init__(self, options: EngineOptions) -> None:
        """Raises ``TransferError``."""
        from ucxx._lib import libucxx

        super().__init__(options)
        features = (libucxx.Feature.TAG, libucxx.Feature.WAKEUP)
        config = _OLD_PROTOCOLS | ({} if options.ucx_rdma else {"TLS": _NO_RDMA})
        try:
            self._context = libucxx.UCXContext(config, features)
            self._worker: UCXWorker = libucxx.UCXWorker(
                self._context, enable_delayed_submission=False, enable_python_future=False
            )
        except Exception as error:
            super().close()
            raise TransferError(f"UCX cannot start: {error!r}") from error

    def _info(self) -> bytes:
        return bytes(self._worker.address.tobytes())

    def _open(self, lane_id: int, info: bytes, *, dialled: bool) -> Lane:
        return _UcxLane(self._worker, lane_id, info, dialled=dialled)

    def _drive(self) -> None:
        self._worker.progress()
