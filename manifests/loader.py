"""The manifest from a file: read, checked, frozen."""

from __future__ import annotations

from pathlib import Path

import msgspec
from msgspec.structs import replace

from llmserve.manifests.consistency import inconsistencies
from llmserve.manifests.environment import missing_variables, resolve
from llmserve.manifests.errors import ManifestError, Problem, shown
from llmserve.manifests.schema import Manifest, Tenant
from llmserve.manifests.structure import problems
from llmserve.manifests.yaml_text import Document, read_yaml

__all__ = ["ManifestError", "load", "missing_variables", "parse", "resolve"]

_MAX_BYTES = 1 << 20


def load(path: str | Path) -> Manifest:
    """The manifest in the file at ``path``. Raises ``ManifestError``."""
    source = str(path)
    try:
        with Path(path).open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ManifestError([f"{source}: cannot be read: {reason}"]) from error
    if len(data) > _MAX_BYTES:
        raise ManifestError([f"{source}: is larger than {_MAX_BYTES} bytes, so it is no manifest"])
    try:
        return parse(data.decode("utf-8-sig"), source)
    except UnicodeDecodeError as error:
        raise ManifestError(
            [f"{source}: is not UTF-8 text: byte {error.start} is {data[error.start]:#04x}"]
        ) from error


def parse(text: str, source: str) -> Manifest:
    """The manifest in ``text``; messages begin with ``source`` and the line.

    Raises ``ManifestError`` with all problems of form at once or, if there are none, all of meaning.
    """
    document = read_yaml(text, source)
    if not isinstance(document.value, dict):
        what = "empty" if document.value is None else shown(document.value)
        raise ManifestError([f"{source}: is {what}; it must be a mapping of apiVersion, kind, metadata, spec"])
    _raise(list(problems(document.value, msgspec.inspect.type_info(Manifest))), document, source)
    try:
        manifest = msgspec.convert(document.value, Manifest)
    except msgspec.ValidationError as error:
        raise ManifestError([f"{source}: {error}"]) from error
    manifest = _with_default_tenant(manifest)
    _raise(inconsistencies(manifest), document, source)
    return manifest


def _raise(found: list[Problem], document: Document, source: str) -> None:
    if found:
        raise ManifestError([f"{source}:{document.line(problem.path)}: {problem}" for problem in found])


def _with_default_tenant(manifest: Manifest) -> Manifest:
    """Callers without a key of their own are the tenant ``default``, so there always is one."""
    fair_share = manifest.spec.scheduling.fair_share
    if "default" in fair_share.tenants:
        return manifest
    tenants = {"default": Tenant(), **fair_share.tenants}
    scheduling = replace(manifest.spec.scheduling, fair_share=replace(fair_share, tenants=tenants))
    return replace(manifest, spec=replace(manifest.spec, scheduling=scheduling))
