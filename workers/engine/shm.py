"""Shared memory that killed engines left behind."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

logger = logging.getLogger(__name__)

_PATTERNS = ("psm_*", "vllm_*")
_MIN_AGE_S = 60.0
"""A younger file may not be mapped yet by the process that made it."""


def sweep(folder: Path = Path("/dev/shm"), proc: Path = Path("/proc")) -> int:
    """Delete this user's files of vLLM that no process maps or holds open; returns the bytes freed."""
    found = [path for pattern in _PATTERNS for path in folder.glob(pattern) if _is_old(path)]
    if not found:
        return 0
    used = _used_files(proc)
    freed_bytes = 0
    for path in found:
        if str(path) in used:
            continue
        try:
            size = path.stat().st_size
            path.unlink()
        except OSError as error:
            logger.info("shared memory %s stays: %s", path, error)
            continue
        freed_bytes += size
    if freed_bytes:
        logger.warning("freed %d MB of shared memory that killed engines had left", freed_bytes // 1_000_000)
    return freed_bytes


def _is_old(path: Path) -> bool:
    try:
        stat = path.stat()
    except OSError:
        return False
    return stat.st_uid == os.getuid() and time.time() - max(stat.st_mtime, stat.st_ctime) > _MIN_AGE_S


def _used_files(proc: Path) -> set[str]:
    used: set[str] = set()
    for process in proc.glob("[0-9]*"):
        try:
            maps = (process / "maps").read_text()
            used.update(os.readlink(fd) for fd in (process / "fd").iterdir())
        except OSError:
            continue  # it ended meanwhile, or belongs to another user, who cannot hold our private files
        used.update(line.split(maxsplit=5)[-1] for line in maps.splitlines() if "/" in line)
    return used
