"""An engine with memory, in this process and in one that can be killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from llmserve.kvstore.transfer import open_engine
from llmserve.kvstore.transfer.base import EngineOptions, Handle, Place, Progress, Region, Run, TransferEngine

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


class End:
    """An engine with registered memory."""

    def __init__(self, name: str, size_bytes: int, fingerprint: str = "f") -> None:
        self.engine = open_engine(name, EngineOptions(fingerprint=fingerprint))
        self.data = np.zeros(size_bytes, dtype=np.uint8)
        self.engine.register([Region(self.address, self.data.nbytes, HOST)])

    @property
    def address(self) -> int:
        return int(self.data.ctypes.data)

    def pages(self, page_bytes: int) -> np.ndarray:
        return self.data.reshape(-1, page_bytes)

    def finish(self, handle: Handle, *others: TransferEngine, wait_s: float = WAIT_S) -> Progress:
        """Where a transfer ended; ``RUNNING`` at the deadline."""
        wait_for(lambda: self.engine.poll(handle) is not Progress.RUNNING, *others, wait_s=wait_s)
        return self.engine.poll(handle)


class Hello(msgspec.Struct):
    """What an end in another process says first."""

    description: bytes
    address: int


class Victim:
    """An end in a process of its own: its memory is filled with ``fill``, and it serves until it is killed."""

    def __init__(self, name: str, size_bytes: int, fill: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.kvstore.ends", name, str(size_bytes), str(fill)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert self.process.stdout is not None
        line = next((line for line in self.process.stdout if line.startswith(b"{")), b"")
        hello = msgspec.json.decode(line, type=Hello)
        self.description, self.address = hello.description, hello.address

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


def runs_of(pairs: Sequence[tuple[int, int]], here: int, there: int, page_bytes: int) -> list[Run]:
    """A run for each pair of (local, remote) pages."""
    return [Run(here + a * page_bytes, there + b * page_bytes, page_bytes) for a, b in pairs]


def main() -> None:
    name, size_bytes, fill = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    end = End(name, size_bytes)
    end.data[:] = fill
    print(msgspec.json.encode(Hello(end.engine.describe(), end.address)).decode(), flush=True)
    parent = os.getppid()
    while os.getppid() == parent:
        end.engine.notifications()
        time.sleep(0.0002)


if __name__ == "__main__":
    main()
