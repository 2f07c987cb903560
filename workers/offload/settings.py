"""What the tiers of an engine are told, in plain values for vLLM's configuration; and its stores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from llmserve.kvstore.codec import DiskType
from llmserve.kvstore.stores.base import PageStore
from llmserve.kvstore.stores.filesystem import FilesystemStore
from llmserve.manifests.schema import StorageClass


class TierSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Of the secondary tier, as keyword arguments in vLLM's configuration."""

    classes: tuple[StorageClass, ...] = ()
    """From the fastest to the slowest."""
    disk: DiskType = "raw"
    encryption: str | None = None
    """``env:NAME`` of the key; the key itself never is in a configuration."""
    io_bytes_s: float | None = None


def to_builtins(settings: TierSettings) -> dict[str, Any]:
    """Plain values for vLLM's configuration."""
    plain: dict[str, Any] = msgspec.to_builtins(settings)
    return plain


def from_builtins(values: Mapping[str, Any]) -> TierSettings:
    return msgspec.convert(dict(values), TierSettings)


def make_stores(classes: tuple[StorageClass, ...], *, threads: int = 4) -> list[PageStore]:
    """A store for each class, in order."""
    return [_store(storage, threads) for storage in classes]


def _store(storage: StorageClass, threads: int) -> PageStore:
    if storage.type == "filesystem":
        assert storage.path is not None
        return FilesystemStore(
            storage.name,
            storage.path,
            fsync=storage.fsync,
            direct=storage.gds and direct_works(storage),
            threads=threads,
        )
    # Its libraries take half a second to import, and disks need none of them.
    from llmserve.kvstore.stores.s3 import S3Store

    assert storage.bucket is not None
    return S3Store(
        storage.name,
        storage.bucket,
        region=storage.region,
        endpoint_url=storage.endpoint_url,
        prefix=storage.prefix,
        timeout_s=storage.timeout_s,
    )


def direct_works(storage: StorageClass) -> bool:
    """Whether files of the class can be read past the page cache."""
    from llmserve.kvstore.stores.filesystem import direct_problem

    return storage.path is not None and direct_problem(storage.path) is None


def meeting_place(classes: tuple[StorageClass, ...]) -> str:
    """Where workers of a node meet its manager: the first folder, else the first bucket."""
    for storage in classes:
        if storage.path is not None:
            return storage.path
    return classes[0].bucket or "" if classes else ""
