"""The names of KV pages: chains of block hashes, the same that vLLM computes, without vLLM.

A page holds the keys and values of one block of tokens, which depend on all tokens before it. vLLM (0.32,
``v1/core/kv_cache_utils.py``, algorithm ``sha256_cbor``) names it by ``H(i) = sha256(cbor((H(i-1), tokens, extra)))``
with ``H(-1) = sha256(cbor("vllm-none-hash"))`` and, in the first block of a salted request only,
``extra = (("cache_salt", salt),)``. Its KV events shorten a hash to its last 64 bits, and so does everything that the
router sees: hints for placement need no more. ``tests/workers/engine_vllm/test_kv_events.py`` holds this to vLLM.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator, Sequence

import cbor2

SHORT_BYTES = 8
MAX_BLOCKS = 4096
"""Blocks of one request that are named to the router: 32 KB of a message, 64 Ki tokens of 16-token blocks."""


def _hash(value: object) -> bytes:
    return hashlib.sha256(cbor2.dumps(value, canonical=True)).digest()


_ROOT = _hash("vllm-none-hash")


def chain(tokens: Sequence[int], block_tokens: int, cache_salt: str, parent: bytes = b"") -> Iterator[bytes]:
    """Full hashes (32 bytes) of the full blocks of ``tokens``, in order.

    ``parent``: hash of the block before ``tokens``; empty if they start the request. Without ``cache_salt`` (empty)
    everyone's blocks are the same.
    """
    previous = parent or _ROOT
    extra: object = (("cache_salt", cache_salt),) if cache_salt and not parent else None
    for start in range(0, len(tokens) - block_tokens + 1, block_tokens):
        previous = _hash((previous, tuple(tokens[start : start + block_tokens]), extra))
        extra = None
        yield previous


def short_hashes(tokens: Sequence[int], block_tokens: int, cache_salt: str, max_blocks: int = MAX_BLOCKS) -> bytes:
    """``Request.block_hashes`` of a prompt: ``SHORT_BYTES`` for each of its first ``max_blocks`` full blocks."""
    bounded = tokens if len(tokens) <= max_blocks * block_tokens else tokens[: max_blocks * block_tokens]
    return b"".join(full[-SHORT_BYTES:] for full in chain(bounded, block_tokens, cache_salt))


def pack_short(hashes: Iterable[int]) -> bytes:
    """Short hashes as vLLM's events give them, 64-bit integers, to the bytes of our messages."""
    return b"".join(number.to_bytes(SHORT_BYTES, "big") for number in hashes)


def unpack_short(data: bytes) -> tuple[int, ...]:
    """The short hashes in ``data``. Raises ``ValueError`` if it is cut short."""
    count, rest = divmod(len(data), SHORT_BYTES)
    if rest:
        raise ValueError(f"{len(data)} bytes are no block hashes of {SHORT_BYTES} bytes each")
    return struct.unpack(f">{count}Q", data)
