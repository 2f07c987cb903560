"""Memory that pages lie in: the host's, or a GPU's."""

from __future__ import annotations

from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmserve.kvstore.transfer.base import Place

Bytes: TypeAlias = NDArray[np.uint8]

FOREIGN_BYTES = 98304
"""Behind the memory that may be registered."""
FOREIGN = 201
"""What lies there."""


class Memory(Protocol):
    address: int

    def write(self, values: Bytes | int, at_bytes: int = 0) -> None:
        """Bytes, or one byte everywhere."""

    def read(self) -> Bytes:
        """A copy."""


class HostMemory:
    def __init__(self, size_bytes: int) -> None:
        self._all = np.zeros(size_bytes + FOREIGN_BYTES, dtype=np.uint8)
        self._all[size_bytes:] = FOREIGN
        self._data = self._all[:size_bytes]
        self.address = int(self._data.ctypes.data)

    def write(self, values: Bytes | int, at_bytes: int = 0) -> None:
        if isinstance(values, int):
            self._data[:] = values
        else:
            self._data[at_bytes : at_bytes + values.size] = values

    def read(self) -> Bytes:
        return self._data.copy()


class GpuMemory:
    def __init__(self, size_bytes: int, device: int) -> None:
        import torch

        self._device = f"cuda:{device}"
        whole = torch.full((size_bytes + FOREIGN_BYTES,), FOREIGN, dtype=torch.uint8, device=self._device)
        self._data = whole[:size_bytes]
        self.write(0)
        self.address = int(self._data.data_ptr())

    def write(self, values: Bytes | int, at_bytes: int = 0) -> None:
        import torch

        if isinstance(values, int):
            self._data.fill_(values)
        else:
            self._data[at_bytes : at_bytes + values.size].copy_(torch.from_numpy(values.copy()))
        torch.cuda.synchronize(self._device)

    def read(self) -> Bytes:
        import torch

        torch.cuda.synchronize(self._device)
        copied: Bytes = self._data.cpu().numpy()
        return copied


def allocated(size_bytes: int, place: Place) -> Memory:
    """Zeroed memory of ``place``."""
    return HostMemory(size_bytes) if place.gpu is None else GpuMemory(size_bytes, place.gpu)
