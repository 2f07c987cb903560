"""GPU memory of other processes, mapped through CUDA IPC and copied by a kernel of this process."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from llmserve.kvstore.transfer.base import Progress, Region, TransferError
from llmserve.kvstore.transfer.runs import Spans, as_array
from llmserve.kvstore.transfer.staging import Slot, Staging, slot_bytes

if TYPE_CHECKING:
    import numpy
    import torch
    from numpy.typing import NDArray

    from llmserve.kvstore.transfer.cuda_copy import Launched

_HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1


class _Handle(ctypes.Structure):
    _fields_ = [("data", ctypes.c_char * _HANDLE_BYTES)]


class _Exported(msgspec.Struct, frozen=True, array_like=True):
    """One allocation."""

    base: int
    size_bytes: int
    handle: bytes


class _Exports(msgspec.Struct, frozen=True, array_like=True):
    pid: int
    allocations: list[_Exported]


@dataclass(frozen=True, slots=True)
class IpcRegion:
    """A peer's allocation: ``base`` there is ``mapped`` here."""

    base: int
    size_bytes: int
    mapped: int
    own: bool
    """It is this process's own memory: nothing was mapped."""


@dataclass(slots=True)
class CudaCopy:
    """A copy under way."""

    launched: Launched


class _Driver:
    """The four driver calls."""

    def __init__(self) -> None:
        """Raises ``TransferError``."""
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise TransferError(f"no CUDA driver: {error}") from error
        self._library.cuIpcOpenMemHandle_v2.argtypes = [ctypes.POINTER(ctypes.c_uint64), _Handle, ctypes.c_uint]

    def call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(code, ctypes.byref(text))
            raise TransferError(f"{name}: {(text.value or b'').decode() or code}")

    def allocation(self, address: int) -> tuple[int, int]:
        """(base, size in bytes) of what ``address`` lies in."""
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        self.call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address))
        return base.value, size.value

    def export(self, base: int) -> bytes:
        handle = _Handle()
        self.call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(base))
        return bytes(memoryview(handle))

    def open(self, handle: bytes) -> int:
        mapped = ctypes.c_uint64()
        raw = _Handle.from_buffer_copy(handle)
        self.call("cuIpcOpenMemHandle_v2", ctypes.byref(mapped), raw, _LAZY_PEER_ACCESS)
        return mapped.value

    def close(self, mapped: int) -> None:
        self.call("cuIpcCloseMemHandle", ctypes.c_uint64(mapped))


class CudaCopier:
    """Maps peers' memory and copies on a stream of its own."""

    def __init__(self, gpu: int) -> None:
        """Raises ``TransferError``."""
        if importlib.util.find_spec("triton") is None:
            raise TransferError("package triton is not installed")
        import torch

        if not torch.cuda.is_available():
            raise TransferError("torch finds no GPU")
        from llmserve.kvstore.transfer import cuda_copy

        self._copy = cuda_copy
        self._gpu = gpu
        torch.cuda.set_device(gpu)
        self._driver = _Driver()
        self._stream = torch.cuda.Stream(device=gpu)
        self._exports: dict[int, _Exported] = {}
        self._warm_up()

    def _warm_up(self) -> None:
        """Compile both kernels before anybody waits for them."""
        import numpy
        import torch

        memory = torch.zeros(64, dtype=torch.uint8, device=f"cuda:{self._gpu}")
        for shift in (0, 1):
            address = memory.data_ptr()
            self._copy.launch(numpy.array([[address, address + 32, 16 - shift]]), self._stream)
        self._stream.synchronize()

    def register(self, regions: Sequence[Region]) -> None:
        """Raises ``TransferError`` for memory that cannot be shared."""
        for region in regions:
            base, size_bytes = self._driver.allocation(region.address)
            if base not in self._exports:
                self._exports[base] = _Exported(base, size_bytes, self._driver.export(base))

    def describe(self) -> bytes:
        return msgspec.msgpack.encode(_Exports(os.getpid(), list(self._exports.values())))

    def open(self, description: bytes) -> list[IpcRegion]:
        """Map a peer's memory. Raises ``TransferError``."""
        self._enter()
        try:
            said = msgspec.msgpack.decode(description, type=_Exports)
        except msgspec.MsgspecError as error:
            raise TransferError(f"not a list of GPU memory: {error}") from error
        regions: list[IpcRegion] = []
        try:
            for item in said.allocations:
                own = said.pid == os.getpid()
                mapped = item.base if own else self._driver.open(item.handle)
                regions.append(IpcRegion(item.base, item.size_bytes, mapped, own))
        except TransferError:
            self.close_regions(regions)
            raise
        return regions

    def close_regions(self, regions: Sequence[IpcRegion]) -> None:
        self._stream.synchronize()
        for region in regions:
            if not region.own:
                self._driver.close(region.mapped)

    def _enter(self) -> None:
        import torch

        torch.cuda.set_device(self._gpu)

    def start(
        self,
        regions: Sequence[IpcRegion],
        here: NDArray[numpy.uint64],
        there: NDArray[numpy.uint64],
        *,
        write: bool,
    ) -> CudaCopy:
        """Pieces as (address, size); those of ``there`` are the peer's addresses."""
        import numpy

        self._enter()
        mapped = numpy.zeros(len(there), dtype=numpy.uint64)
        for region in regions:
            base, end = numpy.uint64(region.base), numpy.uint64(region.base + region.size_bytes)
            inside = (there[:, 0] >= base) & (there[:, 0] < end)
            mapped[inside] = there[inside, 0] - base + numpy.uint64(region.mapped)
        if not mapped.all():
            raise TransferError("pages lie in GPU memory that is not mapped")
        mine = here[:, 0]
        source, target = (mine, mapped) if write else (mapped, mine)
        table = numpy.stack([source, target, here[:, 1]], axis=1).astype(numpy.int64)
        return CudaCopy(self._copy.launch(table, self._stream))

    def poll(self, copy: CudaCopy) -> Progress:
        return Progress.DONE if copy.launched.event.query() else Progress.RUNNING

    def order_after(self, mark: object) -> None:
        import torch

        if isinstance(mark, torch.cuda.Event):
            self._stream.wait_event(mark)

    def hold_up(self, copy: CudaCopy) -> None:
        import torch

        torch.cuda.current_stream(self._gpu).wait_event(copy.launched.event)

    @staticmethod
    def settle(mark: object) -> None:
        import torch

        if isinstance(mark, torch.cuda.Event):
            mark.synchronize()

    def close(self) -> None:
        self._stream.synchronize()


class GpuStaging(Staging):
    """Buffers in GPU memory."""

    def __init__(self, gpu: int) -> None:
        import torch

        from llmserve.kvstore.transfer import cuda_copy

        super().__init__()
        self._copy, self._gpu = cuda_copy, gpu
        self._stream = torch.cuda.Stream(device=gpu)

    def _make(self) -> Slot:
        import torch

        size_bytes = slot_bytes(gpu=True)
        buffer: torch.Tensor = torch.empty(size_bytes, dtype=torch.uint8, device=f"cuda:{self._gpu}")
        return Slot(int(buffer.data_ptr()), buffer, size_bytes)

    def gather(self, spans: Spans, slot: Slot) -> None:
        self._run(spans, slot, out=True)

    def scatter(self, slot: Slot, spans: Spans) -> None:
        self._run(spans, slot, out=False)

    def _run(self, spans: Spans, slot: Slot, *, out: bool) -> None:
        import numpy
        import torch

        torch.cuda.set_device(self._gpu)
        pieces = as_array(spans)
        sizes = pieces[:, 1]
        staged = numpy.uint64(slot.address) + numpy.cumsum(sizes) - sizes
        source, target = (pieces[:, 0], staged) if out else (staged, pieces[:, 0])
        self._copy.launch(numpy.stack([source, target, sizes], axis=1).astype(numpy.int64), self._stream)
        self._stream.synchronize()
