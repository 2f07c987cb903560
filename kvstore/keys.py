"""Names of pages: what a page is called in memory, on disk and in object stores.

A page is one KV block over all layers. Its key says what may read it (``fingerprint``, ``rank``), who may read it
(``space``) and what is in it (``block``, the hash of all tokens up to its end, and ``group``). The space is a part
of the name, so that one tenant's requests never even ask for the files of another: who knows or guesses a block hash
gains nothing by it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import msgspec

from llmserve.manifests.schema import Manifest
from llmserve.manifests.sizes import GB

ALL_RANKS = "all"
"""Rank of a page that holds the shards of all ranks of its engine, one after the other, as the tiers keep it."""
SUFFIX = ".kv"
_FORMAT = "v1"
_NAME = re.compile(r"[A-Za-z0-9_-]{1,72}\Z")
_FILE = re.compile(r"([0-9a-f]{8,128})\.([0-9]{1,5})\.kv\Z")


class PageKey(msgspec.Struct, frozen=True, gc=False):
    """One page. ``path`` is its place below a storage class's root, and the key of its object."""

    fingerprint: str
    """Of the pages' content: model, dtype, layout, page size, parallelism, engine version, ISA on CPUs."""
    space: str
    """Tenants that may read it: see ``space_of``."""
    block: bytes
    """Block hash, 32 bytes, salted with the space's cache salt."""
    group: int = 0
    """KV cache group of the engine."""
    rank: str = ALL_RANKS

    @property
    def path(self) -> str:
        """``v1/<fingerprint>/<rank>/<space>/<first byte>/<block>.<group>.kv``."""
        name = self.block.hex()
        return f"{folder(self.fingerprint, self.rank)}/{self.space}/{name[:2]}/{name}.{self.group}{SUFFIX}"

    def identity(self) -> bytes:
        """What binds an encrypted page to its key."""
        return self.path.encode()


def folder(fingerprint: str, rank: str = ALL_RANKS) -> str:
    """Below it lie all pages of one kind, by space."""
    return f"{_FORMAT}/{fingerprint}/{rank}"


def parse_path(path: str) -> PageKey | None:
    """The key of a page's path, None for anything else (temporary files, strangers)."""
    parts = path.split("/")
    if len(parts) != 6 or parts[0] != _FORMAT or not all(_NAME.match(part) for part in parts[1:4]):
        return None
    match = _FILE.match(parts[5])
    if match is None or len(match[1]) % 2 or match[1][:2] != parts[4]:
        return None
    return PageKey(parts[1], parts[3], bytes.fromhex(match[1]), int(match[2]), parts[2])


def space_of(tenant: str, sharing: Mapping[str, Sequence[str]]) -> str:
    """The space of a tenant's pages: its group's if ``security.cache_sharing`` puts it in one, else its own."""
    for group, members in sharing.items():
        if tenant in members:
            return f"g-{group}"
    return f"t-{tenant}"


def spaces(tenants: Sequence[str], sharing: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """All spaces with their tenants."""
    found: dict[str, list[str]] = {}
    for tenant in tenants:
        found.setdefault(space_of(tenant, sharing), []).append(tenant)
    return found


def hot_bytes(manifest: Manifest) -> dict[str, float]:
    """Hot sets by space; a group that shares has those of its members together."""
    spec = manifest.spec
    wishes = spec.kv_cache.eviction.tenant_hotset_gb if spec.kv_cache.eviction is not None else {}
    groups = spaces(list(wishes), spec.security.cache_sharing)
    return {space: sum(wishes[tenant] for tenant in tenants) * GB for space, tenants in groups.items()}
