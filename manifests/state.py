"""Where a deployment keeps its state on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from llmserve.manifests.schema import Manifest


def state_dir(manifest: Manifest, environ: Mapping[str, str]) -> Path:
    """Folder of the embedded server: the manifest's, else ``$XDG_STATE_HOME/llmserve/<deployment>``."""
    if manifest.spec.bus.state_dir:
        return Path(manifest.spec.bus.state_dir).expanduser()
    base = environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "llmserve" / manifest.metadata.name
