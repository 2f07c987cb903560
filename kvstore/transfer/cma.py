"""Cross-memory attach: the kernel copies between two processes of one user; no memory has to be registered.

Measured faster than ``memcpy`` between buffers of one process for scattered pieces of 64 KiB and more, and faster
than copying out of a shared-memory segment. See process_vm_readv(2).
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

IOVECS = 256
"""Pieces in one call; the kernel takes 1024."""
_PR_SET_PTRACER = 0x59616D61
_ANYONE = 2**64 - 1


class CrossMemory:
    """The two system calls."""

    def __init__(self) -> None:
        """Raises ``OSError`` where there are none."""
        libc = ctypes.CDLL(None, use_errno=True)
        signature: list[Any] = [
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_ulong,
            ctypes.c_void_p,
            ctypes.c_ulong,
            ctypes.c_ulong,
        ]
        try:
            self._calls = libc.process_vm_readv, libc.process_vm_writev
        except AttributeError as error:
            raise OSError(errno.ENOSYS, "this C library has no process_vm_readv") from error
        for call in self._calls:
            call.restype, call.argtypes = ctypes.c_ssize_t, signature
        self._prctl = libc.prctl

    def permit(self) -> None:
        """Let other processes of this user in, where the Yama module admits only parents; else without effect."""
        self._prctl(_PR_SET_PTRACER, ctypes.c_ulong(_ANYONE), 0, 0, 0)

    def copy(
        self, pid: int, local: NDArray[numpy.uint64], remote: NDArray[numpy.uint64], *, write: bool = False
    ) -> None:
        """Copy at most ``IOVECS`` pieces of equal sizes; releases the GIL. Raises ``OSError``.

        Shape of both (pieces, 2): address and size in bytes, which is the layout of ``struct iovec``.
        """
        call, count, want = self._calls[write], len(local), int(local[:, 1].sum())
        done = call(pid, local.ctypes.data, count, remote.ctypes.data, count, 0)
        if done != want:
            code = ctypes.get_errno() if done < 0 else errno.EFAULT
            raise OSError(code, f"{max(done, 0)} of {want} bytes: {os.strerror(code)}")
