"""NIXL over UCX.

UCX needs both ends driven: a read of an owner's memory does not end while the owner computes or idles. NIXL's own
progress thread does that by busy-polling, half a core each, which only a machine with a GPU has to spare. Elsewhere a
thread here wakes up at intervals; one lock keeps it and the owner apart.
"""

from __future__ import annotations

import importlib.util
import logging
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmserve.kvstore.transfer.base import (
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

_BACKEND = "UCX"
_ACTIVE_PAUSE_S = 0.002
_IDLE_PAUSE_S = 0.025
_ACTIVE_FOR_S = 2.0
"""After the owner's last call; a step of an engine takes less, mostly."""


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
    settled: Progress = Progress.RUNNING


class NixlEngine(TransferEngine):
    """One NIXL agent with the UCX backend; ``backend_policy`` ``auto`` and ``ucx`` both mean UCX today."""

    name = "nixl"

    def __init__(self, *, progress_thread: bool) -> None:
        """``progress_thread``: NIXL's own, for machines with cores to spare."""
        from nixl._api import nixl_agent, nixl_agent_config, nixl_thread_sync_t

        config = nixl_agent_config(
            backends=[_BACKEND],
            enable_prog_thread=progress_thread,
            num_threads=1,
            sync_mode=nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT,
        )
        try:
            self._agent: nixl_agent = nixl_agent(f"llmserve-{uuid.uuid4().hex}", config)
        except Exception as error:
            raise TransferError(f"NIXL cannot start its {_BACKEND} backend: {error!r}") from error
        self._registered: list[object] = []
        self._peers: set[str] = set()
        self._received: list[bytes] = []
        self._lock = threading.Lock()
        self._last_call_s = time.monotonic()
        self._closing = threading.Event()
        self._driver: threading.Thread | None = None
        if not progress_thread:
            self._driver = threading.Thread(target=self._drive, name="nixl-progress", daemon=True)
            self._driver.start()

    def _drive(self) -> None:
        pause_s = _IDLE_PAUSE_S
        while not self._closing.wait(pause_s):
            with self._lock:
                self._receive()
                active = time.monotonic() - self._last_call_s < _ACTIVE_FOR_S
            pause_s = _ACTIVE_PAUSE_S if active else _IDLE_PAUSE_S

    def register(self, regions: Sequence[Region]) -> None:
        with self._lock:
            self._register(regions)

    def _register(self, regions: Sequence[Region]) -> None:
        for place in dict.fromkeys(region.place for region in regions):
            spans = [(r.address, r.size_bytes, _device(place), "") for r in regions if r.place == place]
            try:
                descs = self._agent.get_reg_descs(spans, _kind(place))
                self._registered.append(self._agent.register_memory(descs, backends=[_BACKEND]))
            except Exception as error:
                total = sum(r.size_bytes for r in regions if r.place == place)
                raise TransferError(f"NIXL cannot register {total} bytes of {_kind(place)}: {error!r}") from error

    def describe(self) -> bytes:
        with self._lock:
            return bytes(self._agent.get_agent_metadata())

    def connect(self, description: bytes) -> str:
        try:
            with self._lock:
                name = self._agent.add_remote_agent(description)
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
            with self._lock:
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
        self._last_call_s = time.monotonic()
        try:
            with self._lock:
                xfer = self._agent.initialize_xfer(
                    operation,
                    self._agent.get_xfer_descs(here, _kind(local)),
                    self._agent.get_xfer_descs(there, _kind(remote)),
                    peer,
                )
                handle = _NixlHandle(xfer, sum(run.size_bytes for run in runs))
                handle.settled = _PROGRESS[self._agent.transfer(xfer)]
        except Exception as error:
            raise _translate(error, f"NIXL cannot start a {operation} of {len(runs)} runs") from error
        return handle

    def poll(self, handle: Handle) -> Progress:
        assert isinstance(handle, _NixlHandle)
        if handle.settled is Progress.RUNNING:
            try:
                with self._lock:
                    handle.settled = _PROGRESS[self._agent.check_xfer_state(handle.xfer)]
            except Exception as error:
                logger.warning("NIXL transfer of %d bytes failed: %r", handle.bytes_moved, error)
                handle.settled = Progress.FAILED
        return handle.settled

    def release(self, handle: Handle) -> bool:
        assert isinstance(handle, _NixlHandle)
        try:
            with self._lock:
                self._agent.release_xfer_handle(handle.xfer)
        except Exception as error:
            logger.warning("NIXL cannot cancel a transfer of %d bytes yet: %r", handle.bytes_moved, error)
            return False
        return True

    def notify(self, peer: str, message: bytes) -> None:
        try:
            with self._lock:
                self._agent.send_notif(peer, message)
        except Exception as error:
            raise _translate(error, f"NIXL cannot notify {peer}") from error

    def notifications(self) -> list[bytes]:
        with self._lock:
            self._last_call_s = time.monotonic()
            self._receive()
            received, self._received = self._received, []
        return received

    def _receive(self) -> None:
        try:
            received = self._agent.get_new_notifs()
        except Exception as error:
            # Raised when a peer vanished; nothing of the others is lost, it comes with the next call.
            logger.warning("NIXL cannot read notifications now: %r", error)
            return
        self._received.extend(message for messages in received.values() for message in messages)

    def close(self) -> None:
        self._closing.set()
        if self._driver is not None:
            self._driver.join()
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
