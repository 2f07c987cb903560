"""The kv role: the manager of a node's KV memory.

Today it has one duty, since the tiers below the GPU are not built yet: engines that were killed leave their shared
memory behind, and what no process maps is given back to the node.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter

logger = logging.getLogger("llmserve.kv")

ENGINE_SEGMENTS = re.compile(r"(psm_[0-9a-f]{8}|vllm_offload_.+\.mmap)\Z")
"""Names that vLLM's engines give their shared memory."""


def mapped_segments(proc: Path = Path("/proc")) -> set[str]:
    """Names of all files below /dev/shm that a process of this node maps or has open.

    Processes of other users, whose maps cannot be read, are passed over: their segments are not ours to remove either.
    """
    names: set[str] = set()
    for process in proc.glob("[0-9]*"):
        try:
            maps = (process / "maps").read_text()
            links = [str(descriptor.readlink()) for descriptor in (process / "fd").iterdir()]
        except OSError:
            continue
        names.update(match for match in re.findall(r"/dev/shm/(\S+)", maps))
        names.update(link.removeprefix("/dev/shm/") for link in links if link.startswith("/dev/shm/"))
    return names


def sweep(older_than_s: float, now_s: float, shm: Path = Path("/dev/shm"), proc: Path = Path("/proc")) -> int:
    """Remove this user's engine segments that no process maps and that are older than that; returns their bytes.

    Young ones are kept: between creating a segment and mapping it an engine looks like a dead one.
    """
    candidates = [path for path in shm.glob("*") if ENGINE_SEGMENTS.match(path.name)]
    if not candidates:
        return 0
    mapped, freed = mapped_segments(proc), 0
    for path in candidates:
        try:
            stat = path.stat()
            if stat.st_uid != os.getuid() or path.name in mapped or now_s - stat.st_mtime < older_than_s:
                continue
            path.unlink()
        except FileNotFoundError:
            continue
        freed += stat.st_size
        logger.info("removed shared memory of a dead engine", extra={"segment": path.name, "bytes": stat.st_size})
    return freed


class KvManager:
    """Sweeps the node's shared memory every ``every_s`` seconds and counts what it gave back."""

    def __init__(self, registry: CollectorRegistry, every_s: float = 60.0, older_than_s: float = 600.0) -> None:
        self._every_s = every_s
        self._older_than_s = older_than_s
        self._reclaimed = Counter(
            "llmserve_shared_memory_reclaimed_bytes", "Shared memory of dead engines given back", registry=registry
        )

    async def run(self) -> None:
        """Sweep until cancelled."""
        while True:
            self._reclaimed.inc(await asyncio.to_thread(sweep, self._older_than_s, time.time()))
            await asyncio.sleep(self._every_s)
