"""What a process says of itself to others on its host."""

from __future__ import annotations

import msgspec


class HostDescription(msgspec.Struct, frozen=True, array_like=True):
    host: str
    pid: int
    started: str
    """See ``processes.started``."""
    socket: bytes
    """Abstract address of the datagram socket."""
    key: bytes
    secret: bytes
    """What lies at ``probe``: reading it proves that this end may read the peer."""
    probe: int
    regions: list[tuple[int, int, int]]
    """Address, size, GPU (-1: none)."""
    ipc: bytes
    """Encoded handles of the regions on GPUs; empty without."""
