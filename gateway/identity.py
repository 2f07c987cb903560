"""API keys and web tokens, and the tenants they belong to."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterator, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Protocol

from llmserve.gateway.caller import DEFAULT_TENANT, Failure
from llmserve.manifests.errors import ManifestError
from llmserve.manifests.schema import ApiKey, Manifest
from llmserve.manifests.secrets import HASH_PREFIX, hash_of, read_key_file

_KINDS = {
    HTTPStatus.UNAUTHORIZED: "AuthenticationError",
    HTTPStatus.FORBIDDEN: "PermissionDeniedError",
    HTTPStatus.SERVICE_UNAVAILABLE: "ServiceUnavailableError",
}


class Denied(Exception):
    """The caller is not served."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        kind = _KINDS[status]
        self.failure = Failure(status, kind, message)


class TokenVerifier(Protocol):
    """Of web tokens."""

    async def tenant_of(self, token: str) -> str:
        """The tenant that the token names. Raises ``Denied``."""


class ApiKeys:
    """The deployment's keys, kept as keyed hashes only. Without keys everyone is the tenant ``default``."""

    def __init__(self, keys: Sequence[str | ApiKey]) -> None:
        # Of this process only: a memory dump does not allow a dictionary attack elsewhere.
        self._pepper = secrets.token_bytes(32)
        self._tenants: dict[bytes, tuple[bytes, str]] = {}
        for entry in keys:
            key, tenant = (entry, DEFAULT_TENANT) if isinstance(entry, str) else (entry.key, entry.tenant)
            hashed = key if key.startswith(HASH_PREFIX) else hash_of(key)
            keyed = self._keyed(hashed)
            self._tenants[keyed] = (keyed, tenant)

    def __len__(self) -> int:
        return len(self._tenants)

    def tenant_of(self, headers: Mapping[bytes, bytes]) -> str | None:
        """Tenant of a request with these headers (names in lower case), or None if it must not be served."""
        if not self._tenants:
            return DEFAULT_TENANT
        return self.find(credentials(headers))

    def find(self, key: bytes) -> str | None:
        """Tenant of a key."""
        # Callers do not know the pepper, so they cannot steer what is compared in the lookup: how long it takes
        # tells nothing about any key. The last word has a comparison in constant time.
        keyed = self._keyed(HASH_PREFIX + hashlib.sha256(key).hexdigest())
        entry = self._tenants.get(keyed)
        if entry is None:
            return None
        known, tenant = entry
        return tenant if hmac.compare_digest(known, keyed) else None

    def _keyed(self, hashed: str) -> bytes:
        return hashlib.blake2b(hashed.encode(), key=self._pepper).digest()


class Identity:
    """Names the tenant of a request, by its API key or its web token."""

    def __init__(self, keys: ApiKeys, tokens: TokenVerifier | None = None) -> None:
        self._keys = keys
        self._tokens = tokens

    async def tenant_of(self, headers: Mapping[bytes, bytes]) -> str:
        """Tenant of a request with these headers (names in lower case). Raises ``Denied``."""
        if self._tokens is None and not len(self._keys):
            return DEFAULT_TENANT
        given = credentials(headers)
        tenant = self._keys.find(given) if given else None
        if tenant is not None:
            return tenant
        if self._tokens is not None and given.count(b".") == 2:
            return await self._tokens.tenant_of(given.decode("latin-1"))
        raise Denied(HTTPStatus.UNAUTHORIZED, "Missing or unknown API key")


def credentials(headers: Mapping[bytes, bytes]) -> bytes:
    """What the caller identifies itself with; empty if with nothing."""
    scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
    return given.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")


def api_keys(manifest: Manifest) -> ApiKeys:
    """The keys of the manifest and of its file. Raises ``ManifestError``."""
    security = manifest.spec.security
    keys: list[str | ApiKey] = list(security.api_keys)
    if security.api_keys_file:
        keys += _checked(manifest, read_key_file(Path(security.api_keys_file)))
        if not keys:
            # Without it an empty file would mean that everybody may come in.
            raise ManifestError([f"spec.security.api_keys_file: {security.api_keys_file} holds no key"])
    return ApiKeys(keys)


def _checked(manifest: Manifest, entries: Sequence[ApiKey]) -> Iterator[ApiKey]:
    for entry in entries:
        if entry.tenant not in manifest.spec.scheduling.fair_share.tenants:
            where = manifest.spec.security.api_keys_file
            known = ", ".join(sorted(manifest.spec.scheduling.fair_share.tenants))
            raise ManifestError([f"spec.security.api_keys_file: {where}: {entry.tenant!r} is no tenant: {known}"])
        yield entry
