"""Cache salts: they divide one engine's pages among tenants.

A salt is part of the first block's hash, and so of all that follow. A gateway derives it from the tenant that the API
key names, and the worker derives it once more from the tenant that the request's subject names: whatever salt stands
in a body, even another tenant's, no request can name, hit or time pages of a tenant that its subject does not name.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence


class CacheSalts:
    """Salts of one deployment. ``sharing``: groups of tenants that share pages; a tenant belongs to one at most."""

    def __init__(self, deployment: str, sharing: Mapping[str, Sequence[str]]) -> None:
        self._key = deployment.encode()
        self._owners = {tenant: f"group/{group}" for group, members in sharing.items() for tenant in members}
        self._known: dict[str, bytes] = {}

    def owner(self, tenant: str) -> bytes:
        """The tenant's own; that of its group if it shares."""
        salt = self._known.get(tenant)
        if salt is None:
            name = self._owners.get(tenant) or f"tenant/{tenant}"
            salt = self._known[tenant] = hmac.digest(self._key, name.encode(), hashlib.sha256)
        return salt

    def worker_salt(self, tenant: str, body_salt: str | None) -> str:
        """What a worker makes of a body's salt: the one that its pages are named by."""
        return request_salt(self.owner(tenant), body_salt)


def request_salt(owner_salt: bytes, salt: str | None) -> str:
    """Salt of a request: the owner's, divided further by ``salt`` if there is one."""
    if salt is None:
        return owner_salt.hex()
    return hmac.new(owner_salt, salt.encode(), hashlib.sha256).hexdigest()
