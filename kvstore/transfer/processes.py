"""Which process of this host a peer is, and that it is still the same one."""

from __future__ import annotations

import os
import select
from dataclasses import dataclass
from pathlib import Path

from llmserve.kvstore.transfer.base import PeerGone


def host_identity() -> str:
    """Equal for processes that see each other's process ids, and for no others."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def started(pid: int) -> str:
    """Field 22 of ``/proc/<pid>/stat``: tells a process from a later one of the same id. Raises ``PeerGone``."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError) as error:
        raise PeerGone(f"process {pid} is gone: {error}") from error


@dataclass(frozen=True, slots=True)
class Process:
    """Another process, held by a descriptor so that its id cannot come to mean another one unnoticed."""

    pid: int
    fd: int

    @classmethod
    def open(cls, pid: int) -> Process:
        """Raises ``PeerGone``."""
        try:
            return cls(pid, os.pidfd_open(pid))
        except OSError as error:
            raise PeerGone(f"process {pid} is gone: {error}") from error

    def gone(self) -> bool:
        return bool(select.select([self.fd], [], [], 0)[0])

    def close(self) -> None:
        os.close(self.fd)
