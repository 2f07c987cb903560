"""An engine with memory, in this process and in one that can be killed."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np

from llmserve.kvstore.transfer import open_engine
from llmserve.kvstore.transfer.base import EngineOptions, Handle, Place, Progress, Region, Run, TransferEngine
from tests.kvstore.memory import Bytes, Memory, allocated

HOST = Place()
WAIT_S = 20.0
ENGINES = ("same_host", "nixl", "ucx", "nccl")


def wait_for(found: Callable[[], bool], *engines: TransferEngine, wait_s: float = WAIT_S) -> bool:
    """Drive the engines until ``found``; False at the deadline."""
    deadline_s = time.monotonic() + wait_s
    while not found():
        if time.monotonic() > deadline_s:
            return False
        for engine in engines:
            engine.notifications()
        time.sleep(0.0002)
    return True


class Far(Protocol):
    """The other end of a pair, in whatever process."""

    place: Place
    description: bytes
    driven: tuple[TransferEngine, ...]
    """Engines that this process has to drive for it."""

    @property
    def address(self) -> int: ...

    def write(self, values: Bytes | int, at_bytes: int = 0) -> None: ...

    def read(self) -> Bytes: ...

    def heard(self) -> list[bytes]:
        """Notifications since the last call."""

    def close(self) -> None: ...


class End:
    """An engine with registered memory; behind it lies ``FOREIGN`` memory, which is not registered."""

    def __init__(self, name: str, size_bytes: int, fingerprint: str = "f", place: Place = HOST) -> None:
        self.place = place
        self.engine = open_engine(name, EngineOptions(gpu=place.gpu, fingerprint=fingerprint))
        self.memory: Memory = allocated(size_bytes, place)
        self.engine.register([Region(self.address, size_bytes, place)])
        self.description = self.engine.describe()
        self.driven: tuple[TransferEngine, ...] = (self.engine,)

    @property
    def address(self) -> int:
        return self.memory.address

    def write(self, values: Bytes | int, at_bytes: int = 0) -> None:
        """Bytes, or one byte everywhere."""
        self.memory.write(values, at_bytes)

    def read(self) -> Bytes:
        return self.memory.read()

    def heard(self) -> list[bytes]:
        return self.engine.notifications()

    def finish(self, handle: Handle, *others: TransferEngine, wait_s: float = WAIT_S) -> Progress:
        """Where a transfer ended; ``RUNNING`` at the deadline."""
        wait_for(lambda: self.engine.poll(handle) is not Progress.RUNNING, *others, wait_s=wait_s)
        return self.engine.poll(handle)

    def close(self) -> None:
        self.engine.close()


class Hello(msgspec.Struct):
    """What an end in another process says first."""

    description: bytes
    address: int


class Order(msgspec.Struct):
    """What it is asked for: ``write``, ``read``, ``heard`` or ``close``."""

    what: str
    values: bytes = b""
    fill: int = -1
    at_bytes: int = 0


class Remote:
    """An end in a process of its own, which serves until it is killed."""

    driven: tuple[TransferEngine, ...] = ()

    def __init__(self, name: str, size_bytes: int, fill: int = 0, place: Place = HOST) -> None:
        self.place = place
        device = "" if place.gpu is None else str(place.gpu)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.kvstore.ends", name, str(size_bytes), str(fill), device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._to, self._from = self.process.stdin, self.process.stdout
        line = next((line for line in self._from if line.startswith(b"{")), b"")
        hello = msgspec.json.decode(line, type=Hello)
        self.description, self._address = hello.description, hello.address

    @property
    def address(self) -> int:
        return self._address

    def write(self, values: Bytes | int, at_bytes: int = 0) -> None:
        if isinstance(values, int):
            self._ask(Order("write", fill=values))
        else:
            self._ask(Order("write", values=values.tobytes(), at_bytes=at_bytes))

    def read(self) -> Bytes:
        return np.frombuffer(msgspec.json.decode(self._ask(Order("read")), type=bytes), dtype=np.uint8)

    def heard(self) -> list[bytes]:
        return msgspec.json.decode(self._ask(Order("heard")), type=list[bytes])

    def close(self) -> None:
        self._ask(Order("close"))
        self.kill()

    def _ask(self, order: Order) -> bytes:
        self._to.write(msgspec.json.encode(order) + b"\n")
        self._to.flush()
        return self._from.readline()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self._to, self._from):
            pipe.close()


def runs_of(pairs: Sequence[tuple[int, int]], here: int, there: int, page_bytes: int) -> list[Run]:
    """A run for each pair of (local, remote) pages."""
    return [Run(here + a * page_bytes, there + b * page_bytes, page_bytes) for a, b in pairs]


def answer(end: End, order: Order, heard: list[bytes]) -> object:
    match order.what:
        case "write":
            end.write(order.fill if order.fill >= 0 else np.frombuffer(order.values, dtype=np.uint8), order.at_bytes)
        case "read":
            return end.read().tobytes()
        case "heard":
            received = list(heard)
            heard.clear()
            return received
        case "close":
            end.close()
    return None


def main() -> None:
    name, size_bytes, fill, device = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    end = End(name, size_bytes, place=Place(int(device)) if device else HOST)
    end.write(fill)
    print(msgspec.json.encode(Hello(end.description, end.address)).decode(), flush=True)
    parent = os.getppid()
    heard: list[bytes] = []
    os.set_blocking(0, False)
    asked = b""
    while os.getppid() == parent:
        heard += end.engine.notifications()
        with contextlib.suppress(BlockingIOError):
            asked += os.read(0, 1 << 20)
        if asked.endswith(b"\n"):
            order, asked = msgspec.json.decode(asked, type=Order), b""
            print(msgspec.json.encode(answer(end, order, heard)).decode(), flush=True)
            if order.what == "close":
                return
        time.sleep(0.0002)


if __name__ == "__main__":
    main()
