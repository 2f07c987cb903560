"""Fields that parse and are not used yet: named, never ignored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llmserve.manifests.errors import FieldPath, ManifestError, dotted
from llmserve.manifests.schema import Manifest, Spec


@dataclass(frozen=True, slots=True)
class Unsupported:
    """A value that asks for something that is not there yet."""

    path: str
    value: str
    reason: str

    def __str__(self) -> str:
        return f"not supported yet: {self.path}: {self.value} ({self.reason})"


def unsupported(manifest: Manifest) -> list[Unsupported]:
    """All such values, in the order of the manifest's sections."""
    return [Unsupported(dotted(path), value, reason) for path, value, reason in _found(manifest.spec)]


def require_supported(manifest: Manifest) -> None:
    """Raise ``ManifestError`` with one line for each value that is not supported yet."""
    found = unsupported(manifest)
    if found:
        raise ManifestError([str(item) for item in found])


def _found(spec: Spec) -> Iterator[tuple[FieldPath, str, str]]:
    if spec.deployment.mode == "k8s":
        yield ("spec", "deployment", "mode"), "k8s", "only local, and docker-compose.yml"
