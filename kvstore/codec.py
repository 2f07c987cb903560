"""Pages below DRAM, encoded: a header, then the page raw, compressed, or quantized and compressed.

What is read is checked before it is used: magic, version, sizes, and a checksum over header, page key and payload
(XXH3), so that a page that was damaged, cut short, or put under another name is a miss. With a key the payload is
sealed with AES-256-GCM, its header and page key authenticated, under a subkey of the page's space (HKDF-SHA256):
bytes of one tenant do not even decrypt under another tenant's name.
"""

from __future__ import annotations

import base64
import binascii
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import xxhash
import zstandard
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from llmserve.kvstore.keys import PageKey
from llmserve.kvstore.quantize import WIDTHS, Bytes, dequantize, quantize, quantized_size

VERSION = 1
DiskType = Literal["raw", "zstd", "int8"]
"""As in the manifest's ``kv_cache.disk_dtype``."""
ValueType = Literal["bf16", "fp16", "fp32", "fp8"]
"""Of the values in a page."""

_MAGIC = b"LSKV"
_HEADER = struct.Struct("<4sBBBBHHQQ32s12sQ")
HEADER_BYTES = _HEADER.size
_CHECKSUM_BYTES = 8
_NO_NONCE = bytes(12)
_TAG_BYTES = 16
_KEY_BYTES = 32
_ENCODINGS: tuple[DiskType, ...] = ("raw", "zstd", "int8")
_VALUES: tuple[ValueType, ...] = ("bf16", "fp16", "fp32", "fp8")
_LEVEL = 1
"""Of zstd: higher levels gain two percent on quantized pages and take several times as long."""


class BadPage(Exception):
    """Bytes that are not the page they should be: damaged, of another version, or sealed with another key."""


class KeyProblem(ValueError):
    """An encryption key that cannot be used; the message does not show it."""


@dataclass(frozen=True, slots=True)
class PageKind:
    """What the pages of an engine are made of."""

    values: ValueType
    page_bytes: int
    group: int | None
    """Values that may share a scale, see ``quantize.group_size``; None: not to be quantized."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a stored page says of itself."""

    encoding: DiskType
    sealed: bool
    values: ValueType
    group: int
    page_bytes: int
    payload_bytes: int
    parent: bytes
    """Hash of the block before it in its prefix; empty for the first."""
    nonce: bytes
    checksum: int


class Codec:
    """Encodes and decodes pages of one kind; safe to use from several threads at once."""

    def __init__(self, kind: PageKind, disk: DiskType, key: bytes | None = None) -> None:
        """``key``: 32 bytes to seal pages with. Sealed pages are misses without it, unsealed ones with it."""
        self._kind = kind
        self._disk = effective(disk, kind)
        self._key = key
        self._subkeys: dict[str, bytes] = {}

    @property
    def kind(self) -> PageKind:
        return self._kind

    @property
    def disk(self) -> DiskType:
        """How pages are really stored."""
        return self._disk

    @property
    def most_bytes(self) -> int:
        """Of an encoded page, at most."""
        page_bytes = self._kind.page_bytes
        # What zstd cannot compress grows by this (``ZSTD_COMPRESSBOUND``).
        return HEADER_BYTES + _TAG_BYTES + page_bytes + page_bytes // 256 + 64

    def encode(self, key: PageKey, page: Bytes, parent: bytes = b"") -> bytes:
        """The bytes to store for ``page`` (uint8, of the kind's size)."""
        if page.size != self._kind.page_bytes:
            raise ValueError(f"a page of {page.size} bytes, {self._kind.page_bytes} expected")
        encoding, payload = self._payload(page)
        nonce = os.urandom(12) if self._key is not None else _NO_NONCE
        head = _HEADER.pack(
            _MAGIC,
            VERSION,
            _ENCODINGS.index(encoding),
            self._key is not None,
            _VALUES.index(self._kind.values),
            self._kind.group or 0 if encoding == "int8" else 0,
            len(parent),
            page.size,
            len(payload) + (_TAG_BYTES if self._key is not None else 0),
            parent,
            nonce,
            0,
        )[:-_CHECKSUM_BYTES]
        if self._key is not None:
            payload = AESGCM(self._subkey(key)).encrypt(nonce, payload, head + key.identity())
        return b"".join((head, struct.pack("<Q", _checksum(head, key, payload)), payload))

    def _payload(self, page: Bytes) -> tuple[DiskType, bytes]:
        if self._disk == "int8":
            assert self._kind.group is not None
            whole = page.size - page.size % (WIDTHS[self._kind.values] * self._kind.group)
            small = quantize(page[:whole], self._kind.values, self._kind.group)
            if small is not None:
                return "int8", _compressed(np.concatenate((small, page[whole:])) if whole < page.size else small)
        if self._disk == "raw":
            return "raw", page.tobytes()
        return "zstd", _compressed(page)

    def decode(self, key: PageKey, data: bytes, page: Bytes) -> None:
        """Write the page in ``data`` into ``page``. Raises ``BadPage``; then ``page`` may hold anything."""
        header = read_header(data)
        payload = memoryview(data)[HEADER_BYTES:]
        if len(payload) != header.payload_bytes:
            raise BadPage(f"{len(payload)} bytes of {header.payload_bytes} are there")
        head = data[: HEADER_BYTES - _CHECKSUM_BYTES]
        if _checksum(head, key, payload) != header.checksum:
            raise BadPage("the checksum does not match")
        if header.page_bytes != page.size or header.values != self._kind.values:
            raise BadPage(
                f"{header.page_bytes} bytes of {header.values}, {page.size} of {self._kind.values} expected"
            )
        if header.sealed != (self._key is not None):
            raise BadPage("it is encrypted and there is no key" if header.sealed else "it is not encrypted")
        if self._key is not None:
            payload = memoryview(self._opened(key, head, header.nonce, payload))
        self._unpack(header, payload, page)

    def _opened(self, key: PageKey, head: bytes, nonce: bytes, payload: memoryview) -> bytes:
        try:
            return AESGCM(self._subkey(key)).decrypt(nonce, payload, head + key.identity())
        except InvalidTag:
            raise BadPage("it is not authentic under this key") from None

    @staticmethod
    def _unpack(header: Header, payload: memoryview, page: Bytes) -> None:
        if header.encoding == "raw":
            if len(payload) != page.size:
                raise BadPage(f"{len(payload)} bytes in a raw page of {page.size}")
            page[:] = np.frombuffer(payload, np.uint8)
            return
        if header.encoding == "zstd":
            page[:] = _decompressed(payload, page.size)
            return
        if not header.group or header.values not in WIDTHS:
            raise BadPage(f"int8 of {header.values} in groups of {header.group}")
        tail = page.size % (WIDTHS[header.values] * header.group)
        whole = page.size - tail
        small = quantized_size(whole, header.values, header.group)
        data = _decompressed(payload, small + tail)
        dequantize(data[:small], page[:whole], header.values, header.group)
        page[whole:] = data[small:]

    def _subkey(self, key: PageKey) -> bytes:
        assert self._key is not None
        found = self._subkeys.get(key.space)
        if found is None:
            derived = HKDF(SHA256(), _KEY_BYTES, salt=None, info=f"llmserve pages {key.space}".encode())
            found = self._subkeys[key.space] = derived.derive(self._key)
        return found


def effective(disk: DiskType, kind: PageKind) -> DiskType:
    """fp8 is 8 bits already, and state of other layers has no groups: such pages are compressed only."""
    quantizable = kind.values in WIDTHS and kind.group is not None
    return disk if disk != "int8" or quantizable else "zstd"


def read_header(data: bytes) -> Header:
    """The header at the start of ``data``. Raises ``BadPage``."""
    if len(data) < HEADER_BYTES:
        raise BadPage(f"{len(data)} bytes are less than a header")
    (
        magic,
        version,
        encoding,
        sealed,
        values,
        group,
        parent_bytes,
        page_bytes,
        payload_bytes,
        parent,
        nonce,
        checksum,
    ) = _HEADER.unpack_from(data)
    if magic != _MAGIC or version != VERSION:
        raise BadPage(f"not a page of version {VERSION}")
    if encoding >= len(_ENCODINGS) or values >= len(_VALUES) or sealed > 1 or parent_bytes > len(parent):
        raise BadPage("the header makes no sense")
    return Header(
        _ENCODINGS[encoding],
        bool(sealed),
        _VALUES[values],
        group,
        page_bytes,
        payload_bytes,
        parent[:parent_bytes],
        nonce,
        checksum,
    )


def encryption_key(wish: str | None, environment: Mapping[str, str]) -> bytes | None:
    """The key of ``encryption: env:NAME``: 32 bytes as hex or base64. Raises ``KeyProblem``."""
    if wish is None:
        return None
    name = wish.removeprefix("env:")
    text = environment.get(name, "").strip()
    if not text:
        raise KeyProblem(f"the environment variable {name} is not set or empty")
    for decoded in (bytes.fromhex, lambda value: base64.b64decode(value, validate=True)):
        try:
            key = decoded(text)
        except (ValueError, binascii.Error):
            continue
        if len(key) == _KEY_BYTES:
            return key
    raise KeyProblem(f"the environment variable {name} must hold {_KEY_BYTES} bytes as hex or base64")


def _checksum(head: bytes, key: PageKey, payload: bytes | memoryview) -> int:
    digest = xxhash.xxh3_64(head)
    digest.update(key.identity())
    digest.update(payload)
    return digest.intdigest()


def _compressed(data: Bytes) -> bytes:
    return zstandard.ZstdCompressor(level=_LEVEL).compress(data.data)


def _decompressed(data: memoryview, size: int) -> Bytes:
    try:
        plain = zstandard.ZstdDecompressor().decompress(data, max_output_size=size)
    except zstandard.ZstdError as error:
        raise BadPage(f"it does not decompress: {error}") from None
    if len(plain) != size:
        raise BadPage(f"{len(plain)} bytes decompressed, {size} expected")
    return np.frombuffer(bytearray(plain), np.uint8)
