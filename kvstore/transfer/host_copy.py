"""Copies between this process and another one's memory, in a thread that can be told to stop."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmserve.kvstore.transfer.base import Handle, Progress
from llmserve.kvstore.transfer.cma import IOVECS, CrossMemory
from llmserve.kvstore.transfer.processes import Process

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

_LOOK_S = 0.0001


@dataclass(slots=True)
class HostCopy(Handle):
    """A copy by the kernel of the operating system."""

    process: Process
    chunks: deque[tuple[NDArray[numpy.uint64], NDArray[numpy.uint64]]]
    write: bool
    bytes_moved: int
    state: Progress = Progress.RUNNING
    running: bool = False
    cancelled: bool = False


@dataclass(slots=True)
class CopyThread:
    """A thread that copies, transfer by transfer."""

    memory: CrossMemory
    queue: deque[HostCopy] = field(default_factory=deque)
    wake: threading.Condition = field(default_factory=threading.Condition)
    closing: bool = False
    thread: threading.Thread | None = None
    done_fd: int = -1
    """An eventfd that tells the caller that something ended."""

    def submit(self, copy: HostCopy) -> None:
        if self.thread is None:
            self.thread = threading.Thread(target=self._run, name="same-host-copy", daemon=True)
            self.thread.start()
        with self.wake:
            self.queue.append(copy)
            self.wake.notify()

    def _run(self) -> None:
        while True:
            with self.wake:
                while not self.queue and not self.closing:
                    self.wake.wait()
                if self.closing:
                    return
                copy = self.queue.popleft()
            self.run(copy)
            os.eventfd_write(self.done_fd, 1)

    def run(self, copy: HostCopy) -> None:
        while True:
            with self.wake:
                if copy.cancelled or self.closing:
                    copy.state, copy.running = Progress.FAILED, False
                    return
                if not copy.chunks:
                    copy.state, copy.running = Progress.DONE, False
                    return
                copy.running = True
                local, remote = copy.chunks.popleft()
            try:
                if copy.process.gone():
                    raise OSError("the process is gone")
                for at in range(0, len(local), IOVECS):
                    part = slice(at, at + IOVECS)
                    self.memory.copy(copy.process.pid, local[part], remote[part], write=copy.write)
            except OSError as error:
                logger.warning("a copy of %d bytes failed: %s", copy.bytes_moved, error)
                with self.wake:
                    copy.state, copy.running = Progress.FAILED, False
                return

    def finish(self, copy: HostCopy) -> None:
        """Return when it has ended; what the thread has not begun is copied by the caller."""
        with self.wake:
            waiting = copy in self.queue
            if waiting:
                self.queue.remove(copy)
        if waiting:
            self.run(copy)
        while copy.state is Progress.RUNNING:
            time.sleep(_LOOK_S)

    def cancel(self, copy: HostCopy) -> bool:
        with self.wake:
            copy.cancelled = True
            return not copy.running

    def close(self) -> None:
        with self.wake:
            self.closing = True
            self.wake.notify()
        if self.thread is not None:
            self.thread.join()
