"""API keys and the tenants they belong to."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping, Sequence

from llmserve.gateway.caller import DEFAULT_TENANT
from llmserve.manifests.schema import ApiKey


class ApiKeys:
    """The deployment's keys, kept as keyed hashes only. Without keys everyone is the tenant ``default``."""

    def __init__(self, keys: Sequence[str | ApiKey]) -> None:
        # Keys of this process only: a memory dump does not allow a dictionary attack elsewhere.
        self._pepper = secrets.token_bytes(32)
        self._tenants = [
            (self._hash(key.encode()), DEFAULT_TENANT)
            if isinstance(key, str)
            else (self._hash(key.key.encode()), key.tenant)
            for key in keys
        ]

    def tenant_of(self, headers: Mapping[bytes, bytes]) -> str | None:
        """Tenant of a request with these headers (names in lower case), or None if it must not be served."""
        if not self._tenants:
            return DEFAULT_TENANT
        scheme, _, credentials = headers.get(b"authorization", b"").partition(b" ")
        given = credentials.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        hashed = self._hash(given)
        found = None
        # Every key is compared, so that the time tells nothing about which one matched.
        for known, tenant in self._tenants:
            if hmac.compare_digest(hashed, known):
                found = tenant
        return found

    def _hash(self, key: bytes) -> bytes:
        return hashlib.blake2b(key, key=self._pepper).digest()
