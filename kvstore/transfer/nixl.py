"""NIXL, over UCX wherever that is to be had.

UCX needs both ends driven: a read of an owner's memory does not end while the owner computes or idles. NIXL's own
progress thread does that by busy-polling, half a core each, which only a machine with a GPU has to spare. Elsewhere
whoever owns the engine calls ``notifications`` at intervals, see ``watch_s``.
"""

from __future__ import annotations

import importlib.util
import logging
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmserve.kvstore.transfer.base import (
    EngineOptions,
    Handle,
    PeerGone,
    Place,
    Progress,
    Region,
    Run,
    TransferEngine,
    TransferError,
)

if TYPE_CHECKING:
    from nixl._api import nixl_agent, nixl_xfer_handle

logger = logging.getLogger(__name__)

_BACKENDS = {"ucx": ("UCX",), "auto": ("UCX", "LIBFABRIC", "Mooncake")}
"""By ``transfer.nixl.backend_policy``: the first that starts is used. All of them move memory between processes."""

_WATCH_S, _WATCH_GPU_S = 0.025, 0.002
"""A machine with GPUs has cores to spare."""
_PATIENCE_S = 1.0
"""For a transfer that is given up."""


def available() -> str | None:
    """None, or why NIXL cannot be used here."""
    if importlib.util.find_spec("nixl") is None:
        return "package nixl is not installed"
    try:
        from nixl._api import nixl_agent  # noqa: F401
    except ImportError as error:
        return f"package nixl cannot be loaded: {error}"
    return None


@dataclass(slots=True)
class _NixlHandle(Handle):
    xfer: nixl_xfer_handle
    bytes_moved: int
    peer: str
    settled: Progress = Progress.RUNNING
    given_up_s: float | None = None


class NixlEngine(TransferEngine):
    """One NIXL agent with one backend."""

    name = "nixl"

    def __init__(self, options: EngineOptions) -> None:
        """Raises ``TransferError``."""
        from nixl._api import nixl_agent, nixl_agent_config, nixl_thread_sync_t

        self.fingerprint = options.fingerprint
        self.watch_s = _WATCH_S if options.gpu is None else _WATCH_GPU_S
        refusals: list[str] = []
        for backend in _BACKENDS[options.nixl_backend_policy]:
            config = nixl_agent_config(
                backends=[backend],
                enable_prog_thread=options.gpu is not None,
                num_threads=1,
                sync_mode=nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT,
            )
            try:
                self._agent: nixl_agent = nixl_agent(f"llmserve-{uuid.uuid4().hex}", config)
            except Exception as error:
                refusals.append(f"{backend}: {error!r}")
                continue
            self.backend = backend
            break
        else:
            raise TransferError(f"NIXL cannot start a backend: {'; '.join(refusals)}")
        self._registered: list[object] = []
        self._peers: set[str] = set()

    def register(self, regions: Sequence[Region]) -> None:
        for place in dict.fromkeys(region.place for region in regions):
            spans = [(r.address, r.size_bytes, _device(place), "") for r in regions if r.place == place]
            try:
                descs = self._agent.get_reg_descs(spans, _kind(place))
                self._registered.append(self._agent.register_memory(descs, backends=[self.backend]))
            except Exception as error:
                total = sum(r.size_bytes for r in regions if r.place == place)
                raise TransferError(f"NIXL cannot register {total} bytes of {_kind(place)}: {error!r}") from error

    def _describe(self) -> bytes:
        return bytes(self._agent.get_agent_metadata())

    def _connect(self, payload: bytes) -> str:
        try:
            name = self._agent.add_remote_agent(payload)
        except Exception as error:
            raise TransferError(f"NIXL cannot add a peer: {error!r}") from error
        peer = name.decode() if isinstance(name, bytes) else str(name)
        self._peers.add(peer)
        return peer

    def forget(self, peer: str) -> None:
        if peer not in self._peers:
            return
        self._peers.discard(peer)
        try:
            self._agent.remove_remote_agent(peer)
        except Exception as error:
            logger.info("NIXL peer %s could not be removed: %r", peer, error)

    def pull(self, peer: str, runs: Sequence[Run], local: Place, remote: Place) -> Handle:
        return self._start("READ", peer, runs, local, remote)

    def push(self, peer: str, runs: Sequence[Run], local: Place, remote: Place) -> Handle:
        return self._start("WRITE", peer, runs, local, remote)

    def _start(self, operation: str, peer: str, runs: Sequence[Run], local: Place, remote: Place) -> Handle:
        here = [(run.local, run.size_bytes, _device(local)) for run in runs]
        there = [(run.remote, run.size_bytes, _device(remote)) for run in runs]
        try:
            xfer = self._agent.initialize_xfer(
                operation,
                self._agent.get_xfer_descs(here, _kind(local)),
                self._agent.get_xfer_descs(there, _kind(remote)),
                peer,
            )
            handle = _NixlHandle(xfer, sum(run.size_bytes for run in runs), peer)
            handle.settled = _PROGRESS[self._agent.transfer(xfer)]
        except Exception as error:
            raise _translate(error, f"NIXL cannot start a {operation} of {len(runs)} runs") from error
        return handle

    def poll(self, handle: Handle) -> Progress:
        assert isinstance(handle, _NixlHandle)
        if handle.settled is Progress.RUNNING:
            try:
                handle.settled = _PROGRESS[self._agent.check_xfer_state(handle.xfer)]
            except Exception as error:
                logger.warning("NIXL transfer of %d bytes failed: %r", handle.bytes_moved, error)
                handle.settled = Progress.FAILED
        return handle.settled

    def release(self, handle: Handle) -> bool:
        assert isinstance(handle, _NixlHandle)
        if self.poll(handle) is Progress.RUNNING:
            # Releasing it would return at once and bytes still land afterwards: only a peer cut off is quiet.
            now_s = time.monotonic()
            handle.given_up_s = handle.given_up_s or now_s
            if now_s - handle.given_up_s < _PATIENCE_S:
                return False
            logger.warning("NIXL does not end a transfer of %d bytes: its peer is cut off", handle.bytes_moved)
            self.forget(handle.peer)
        try:
            self._agent.release_xfer_handle(handle.xfer)
        except Exception as error:
            logger.warning("NIXL cannot cancel a transfer of %d bytes yet: %r", handle.bytes_moved, error)
            return False
        return True

    def notify(self, peer: str, message: bytes) -> None:
        try:
            self._agent.send_notif(peer, message)
        except Exception as error:
            raise _translate(error, f"NIXL cannot notify {peer}") from error

    def notifications(self) -> list[bytes]:
        try:
            received = self._agent.get_new_notifs()
        except Exception as error:
            # Raised when a peer vanished; nothing of the others is lost, it comes with the next call.
            logger.warning("NIXL cannot read notifications now: %r", error)
            return []
        return [message for messages in received.values() for message in messages]

    def close(self) -> None:
        for registration in self._registered:
            try:
                self._agent.deregister_memory(registration)
            except Exception as error:
                logger.info("NIXL memory could not be deregistered: %r", error)
        self._registered.clear()
        for peer in list(self._peers):
            self.forget(peer)


_PROGRESS = {"DONE": Progress.DONE, "PROC": Progress.RUNNING, "ERR": Progress.FAILED}


def _kind(place: Place) -> str:
    return "DRAM" if place.gpu is None else "VRAM"


def _device(place: Place) -> int:
    return place.gpu or 0


def _translate(error: Exception, what: str) -> TransferError:
    kind = PeerGone if "disconnect" in type(error).__name__.lower() else TransferError
    return kind(f"{what}: {error!r}")
