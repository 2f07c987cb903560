"""Tenants on the bus: each in an account of its own, that reaches nothing but its own requests and results.

Permissions of users in one account would not do: an acknowledgement goes to whatever subject the publisher names for
it, so a tenant could write, as the server, where it may not. Between accounts the server maps that subject.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec
import nkeys

from llmserve.bus.subjects import Subjects

USER = "llmserve"
"""As whom the deployment's own members connect."""
_ACCOUNT = "LLMSERVE"
_EXPORTS = {
    "llm.*.submit.*": "service",
    "llm.*.result.*.*": "stream",
    "$JS.API.DIRECT.GET.*.llm.*.result.*.*": "service",
}


class TenantAccount(msgspec.Struct, frozen=True):
    """What is kept of a tenant: nothing secret."""

    deployment: str
    tenant: str
    public_keys: tuple[str, ...]


def new_seed() -> tuple[str, str]:
    """(seed, public key) of a new nkey user; the seed is the secret."""
    seed = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
    pair = nkeys.from_seed(bytearray(seed))
    public = pair.public_key.decode()
    pair.wipe()
    return bytes(seed).decode(), public


def read_accounts(file: Path) -> list[TenantAccount]:
    """Those that were added. Raises ``msgspec.MsgspecError`` if the file is damaged."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=list[TenantAccount])
    except FileNotFoundError:
        return []


def with_key(accounts: Iterable[TenantAccount], deployment: str, tenant: str, public_key: str) -> list[TenantAccount]:
    """``accounts`` and one more key; a tenant may have several."""
    known = {(account.deployment, account.tenant): account for account in accounts}
    before = known.get((deployment, tenant), TenantAccount(deployment, tenant, ()))
    known[deployment, tenant] = TenantAccount(deployment, tenant, (*before.public_keys, public_key))
    return list(known.values())


def accounts_config(password: str | None, accounts: Iterable[TenantAccount]) -> str:
    """The ``accounts`` section of a nats-server's configuration; without a password it is ``$NATS_TOKEN``."""
    quoted = "$NATS_TOKEN" if password is None else json.dumps(password)
    users = f"users: [{{user: {USER}, password: {quoted}}}]"
    # What an account imports is for this configuration to say, so nothing is gained by naming accounts here.
    exports = f"exports: [{', '.join(f'{{{kind}: {json.dumps(subject)}}}' for subject, kind in _EXPORTS.items())}]"
    sections = [f"  {_ACCOUNT}: {{\n    jetstream: enabled\n    {users}\n    {exports}\n  }}\n"]
    for account in accounts:
        name = json.dumps(f"TENANT_{account.deployment}_{account.tenant}")
        imports = [
            f"{{{kind}: {{account: {_ACCOUNT}, subject: {json.dumps(subject)}}}}}"
            for subject, kind in _reach(Subjects(account.deployment), account.tenant).items()
        ]
        users = ", ".join(f"{{nkey: {key}}}" for key in account.public_keys)
        sections.append(f"  {name}: {{\n    users: [{users}]\n    imports: [{', '.join(imports)}]\n  }}\n")
    return f"accounts {{\n{''.join(sections)}}}\n"


def _reach(subjects: Subjects, tenant: str) -> Mapping[str, str]:
    results = subjects.published(tenant, "*")
    return {
        subjects.submit(tenant): "service",
        results: "stream",
        f"$JS.API.DIRECT.GET.{subjects.published_stream}.{results}": "service",
    }
