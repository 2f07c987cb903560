"""Manifests for tests."""

from __future__ import annotations

from pathlib import Path

from llmserve.manifests.loader import ManifestError, parse
from llmserve.manifests.schema import Manifest

SHIPPED = Path(__file__).parents[2] / "manifests"
EXAMPLE = (SHIPPED / "llmserve.yaml").read_text()


def small(spec: str = "", primary: str = "id: m") -> str:
    """The least there can be, and the sections in ``spec``, in flow style."""
    return f"metadata: {{name: d}}\nspec: {{models: {{primary: {{{primary}}}}}{', ' if spec else ''}{spec}}}\n"


def manifest(spec: str = "", primary: str = "id: m") -> Manifest:
    return parse(small(spec, primary), "test.yaml")


def errors(text: str) -> list[str]:
    """The lines about what is wrong with a manifest."""
    try:
        parse(text, "f.yaml")
    except ManifestError as error:
        return list(error.lines)
    return []
