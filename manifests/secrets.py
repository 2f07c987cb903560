"""API keys at rest: the file of their hashes, and how a key is made."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from pathlib import Path

from llmserve.manifests.errors import ManifestError
from llmserve.manifests.schema import ApiKey

HASH_PREFIX = "sha256:"
_LINE = re.compile(r"(?P<hash>sha256:[0-9a-f]{64})\s+(?P<tenant>[A-Za-z0-9_-]{1,64})\Z")


def new_key() -> str:
    """A key of 256 random bits: what makes an unsalted, fast hash of it safe to keep."""
    return f"sk-{secrets.token_urlsafe(32)}"


def hash_of(key: str) -> str:
    """The key as it is kept: ``sha256:HEX``."""
    return HASH_PREFIX + hashlib.sha256(key.encode()).hexdigest()


def read_key_file(path: Path) -> list[ApiKey]:
    """The entries of a file of hashes; ``#`` begins a comment. Raises ``ManifestError`` that names the line."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ManifestError([f"spec.security.api_keys_file: {path} cannot be read: {reason}"]) from error
    entries = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = _LINE.match(text)
        if found is None:
            raise ManifestError([f"spec.security.api_keys_file: {path}:{number}: must be sha256:HEX TENANT"])
        entries.append(ApiKey(key=found["hash"], tenant=found["tenant"]))
    return entries


def add_to_key_file(path: Path, key: str, tenant: str) -> None:
    """Append the hash of ``key``; readable by the owner only if the file is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(descriptor, "a") as file:
        file.write(f"{hash_of(key)} {tenant}\n")
