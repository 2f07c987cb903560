"""A transfer engine that fails on command, around one that works."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

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

Fault = Literal["", "connect", "submit", "gone", "completion", "stall", "silent", "slow"]


class Clock:
    """One that stands still but for those who move it."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class _Wrapped(Handle):
    inner: Handle
    bytes_moved: int
    fault: Fault


class FaultyEngine(TransferEngine):
    """``fault`` is what happens to transfers that start from now on; of ``times`` of them, all by default.

    ``connect``: no peer can be connected; ``submit``, ``gone``: the start raises; ``completion``: ends with an error;
    ``stall``: never ends, and can be cancelled; ``silent``: messages are lost; ``slow``: takes ten times as long.
    """

    def __init__(self, inner: TransferEngine, clock: Clock | None = None, bytes_s: float = 1e9) -> None:
        """By ``clock``, if there is one, its transfers run at ``bytes_s``."""
        self._inner = inner
        self._clock, self._bytes_s = clock, bytes_s
        self.name = inner.name
        self.fingerprint = inner.fingerprint
        self.watch_s = 0.002
        self.fault: Fault = ""
        self.times = 10**9
        self.started: Counter[str] = Counter()

    def _next(self) -> Fault:
        if not self.fault or self.times <= 0:
            return ""
        self.times -= 1
        return self.fault

    def register(self, regions: Sequence[Region]) -> None:
        self._inner.register(regions)

    def describe(self) -> bytes:
        return self._inner.describe()

    def _describe(self) -> bytes:
        raise NotImplementedError

    def _connect(self, payload: bytes) -> str:
        raise NotImplementedError

    def connect(self, description: bytes) -> str:
        if self.fault == "connect":
            raise TransferError("no route, as ordered")
        return self._inner.connect(description)

    def may_reach(self, description: bytes) -> bool:
        return self._inner.may_reach(description)

    def forget(self, peer: str) -> None:
        self._inner.forget(peer)

    def pull(self, peer: str, runs: Sequence[Run], local: Place, remote: Place) -> Handle:
        return self._start("pull", peer, runs, local, remote)

    def push(self, peer: str, runs: Sequence[Run], local: Place, remote: Place) -> Handle:
        return self._start("push", peer, runs, local, remote)

    def _start(self, way: str, peer: str, runs: Sequence[Run], local: Place, remote: Place) -> Handle:
        self.started[way] += 1
        fault = self._next()
        if fault == "submit":
            raise TransferError("not started, as ordered")
        if fault == "gone":
            raise PeerGone("gone, as ordered")
        start = self._inner.pull if way == "pull" else self._inner.push
        handle = start(peer, runs, local, remote)
        if self._clock is not None:
            self._clock.now_s += handle.bytes_moved / self._bytes_s * (10 if fault == "slow" else 1)
        return _Wrapped(handle, handle.bytes_moved, fault)

    def poll(self, handle: Handle) -> Progress:
        assert isinstance(handle, _Wrapped)
        progress = self._inner.poll(handle.inner)
        if handle.fault == "stall":
            return Progress.RUNNING
        return Progress.FAILED if handle.fault == "completion" else progress

    def hold_up(self, handle: Handle) -> None:
        assert isinstance(handle, _Wrapped)
        self._inner.hold_up(handle.inner)

    def finish(self, handle: Handle) -> None:
        assert isinstance(handle, _Wrapped)
        self._inner.finish(handle.inner)

    def release(self, handle: Handle) -> bool:
        assert isinstance(handle, _Wrapped)
        return self._inner.release(handle.inner)

    def notify(self, peer: str, message: bytes) -> None:
        if self.fault != "silent":
            self._inner.notify(peer, message)

    def notifications(self) -> list[bytes]:
        return self._inner.notifications()

    @property
    def busy(self) -> bool:
        return self._inner.busy

    def reachable(self, peer: str) -> bool:
        return self._inner.reachable(peer)

    def wake_fds(self) -> Sequence[int]:
        return self._inner.wake_fds()

    def close(self) -> None:
        self._inner.close()
