"""``env:NAME`` in the manifest: secrets stay out of the file and are read when a process starts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from msgspec.structs import replace

from llmserve.manifests.errors import FieldPath, ManifestError, Problem
from llmserve.manifests.schema import ApiKey, Bus, Manifest, Security

_PREFIX = "env:"
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_HASH = re.compile(r"sha256:[0-9a-f]{64}\Z")
_SCHEMES = ("nats://", "tls://")


@dataclass(frozen=True, slots=True)
class Variable:
    """An environment variable that the manifest refers to."""

    path: FieldPath
    name: str


def variables(manifest: Manifest) -> list[Variable]:
    """Those that the manifest needs when a process starts."""
    return [
        Variable(path, value.removeprefix(_PREFIX)) for path, value in _secrets(manifest) if value.startswith(_PREFIX)
    ]


def missing_variables(manifest: Manifest, environ: Mapping[str, str]) -> list[Variable]:
    """Those that are not set, or empty."""
    return [variable for variable in variables(manifest) if not environ.get(variable.name)]


def resolve(manifest: Manifest, environ: Mapping[str, str]) -> Manifest:
    """The manifest with the variables' values in place. Raises ``ManifestError`` that names all missing ones."""
    missing = missing_variables(manifest, environ)
    if missing:
        raise ManifestError(
            [str(Problem(item.path, f"the environment variable {item.name} is not set or empty")) for item in missing]
        )

    def value_of(text: str) -> str:
        return environ[text.removeprefix(_PREFIX)] if text.startswith(_PREFIX) else text

    spec = manifest.spec
    resolved = replace(
        manifest,
        spec=replace(spec, bus=_resolved_bus(spec.bus, value_of), security=_resolved_keys(spec.security, value_of)),
    )
    problems = list(_resolved_problems(resolved))
    if problems:
        raise ManifestError([str(problem) for problem in problems])
    return resolved


def secret_problem(value: str) -> str | None:
    """What is wrong with the way a secret or its variable is written, without telling the secret."""
    if not value.strip():
        return "is empty; it must be env:NAME or the value itself"
    if value.startswith(_PREFIX) and not _VARIABLE.match(value.removeprefix(_PREFIX)):
        return "must name an environment variable after env:, of letters, digits and '_'"
    return None


def hash_problem(key: str) -> str | None:
    """What is wrong with an API key that is given as its hash."""
    if key.startswith("sha256:") and not _HASH.match(key):
        return "must be 64 hexadecimal digits after sha256:"
    return None


def url_problem(value: str) -> str | None:
    """What is wrong with the address of a nats-server, without telling it: it may carry a password."""
    if value.startswith(_PREFIX) or all(part.strip().startswith(_SCHEMES) for part in value.split(",")):
        return None
    return "must be env:NAME, or servers as nats://host:port or tls://host:port, separated by commas"


def _secrets(manifest: Manifest) -> Iterator[tuple[FieldPath, str]]:
    bus = manifest.spec.bus
    for name, value in (("url", bus.url), ("token", bus.token)):
        if value is not None:
            yield ("spec", "bus", name), value
    for index, entry in enumerate(manifest.spec.security.api_keys):
        yield ("spec", "security", "api_keys", index), entry.key if isinstance(entry, ApiKey) else entry


def _resolved_bus(bus: Bus, value_of: Callable[[str], str]) -> Bus:
    return replace(
        bus,
        url=None if bus.url is None else value_of(bus.url),
        token=None if bus.token is None else value_of(bus.token),
    )


def _resolved_keys(security: Security, value_of: Callable[[str], str]) -> Security:
    keys = tuple(
        replace(entry, key=value_of(entry.key)) if isinstance(entry, ApiKey) else value_of(entry)
        for entry in security.api_keys
    )
    return replace(security, api_keys=keys)


def _resolved_problems(manifest: Manifest) -> Iterator[Problem]:
    """What can be known only now: a bad address, and two variables that hold one key."""
    if manifest.spec.bus.url is not None and (message := url_problem(manifest.spec.bus.url)):
        yield Problem(("spec", "bus", "url"), message)
    seen: set[str] = set()
    for path, value in _secrets(manifest):
        if path[1] == "security":
            if value in seen:
                yield Problem(path, "is the same key as one before it")
            seen.add(value)
