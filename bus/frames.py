"""Several buffers in one: an encoder that keeps large arrays beside its message yields a list of buffers."""

from __future__ import annotations

import struct
from collections.abc import Sequence

_MAGIC = 0xC1
"""The one byte that no msgpack value starts with, so that a single msgpack buffer needs no frame."""
_COUNT = struct.Struct("<BI")
_SIZE = struct.Struct("<Q")


def pack(buffers: Sequence[bytes | bytearray | memoryview]) -> bytes:
    """One buffer that ``unpack`` splits again. A single one that is msgpack is passed through as it is."""
    if len(buffers) == 1 and not (len(buffers[0]) and memoryview(buffers[0]).cast("B")[0] == _MAGIC):
        return bytes(buffers[0])
    parts = [memoryview(buffer).cast("B") for buffer in buffers]
    return b"".join([_COUNT.pack(_MAGIC, len(parts)), *(_SIZE.pack(len(part)) for part in parts), *parts])


def unpack(data: bytes) -> list[memoryview]:
    """The buffers in ``data``, without copying. Raises ``ValueError`` if it is cut short or too long."""
    view = memoryview(data)
    if not data or view[0] != _MAGIC:
        return [view]
    try:
        _, count = _COUNT.unpack_from(view)
        sizes = [_SIZE.unpack_from(view, _COUNT.size + i * _SIZE.size)[0] for i in range(count)]
    except struct.error as error:
        raise ValueError(f"framed buffers cut short: {error}") from error
    start = _COUNT.size + count * _SIZE.size
    if start + sum(sizes) != len(view):
        raise ValueError(f"framed buffers hold {len(view) - start} bytes instead of {sum(sizes)}")
    parts = []
    for size in sizes:
        parts.append(view[start : start + size])
        start += size
    return parts
