"""A folder for the sockets of vLLM's processes, which vLLM itself would leave behind in the machine's one."""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import tempfile
import time
from functools import cache
from pathlib import Path

_PREFIX = "llmserve-engines-"
_LOCK = "lock"
_MIN_AGE_S = 60.0
"""A younger folder may not be locked yet by the process that makes it."""


@cache
def socket_folder() -> Path:
    """This process's folder, which ends with it; those that killed processes left behind are deleted first."""
    root = Path(tempfile.gettempdir())
    sweep(root)
    folder = make(root)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def make(root: Path) -> Path:
    """A new folder in ``root`` that no ``sweep`` deletes while this process lives."""
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
    fcntl.flock(os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600), fcntl.LOCK_EX)
    return folder


def sweep(root: Path) -> None:
    """Delete this user's folders in ``root`` whose processes are gone."""
    for folder in root.glob(f"{_PREFIX}*"):
        if _is_old(folder) and not _is_locked(folder / _LOCK):
            shutil.rmtree(folder, ignore_errors=True)


def _is_old(folder: Path) -> bool:
    try:
        stat = folder.stat()
    except OSError:
        return False
    return stat.st_uid == os.getuid() and time.time() - stat.st_ctime > _MIN_AGE_S


def _is_locked(lock: Path) -> bool:
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
