"""Where a member finds the bus."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmserve.bus.base import BusError
from llmserve.bus.statedir import read_endpoint
from llmserve.manifests.schema import Manifest
from llmserve.manifests.state import state_dir


@dataclass(frozen=True, slots=True)
class BusEndpoint:
    """Address and token of a nats-server; a token may also stand in the URL."""

    url: str
    token: str | None


def bus_endpoint(manifest: Manifest, url: str | None, environ: Mapping[str, str]) -> BusEndpoint:
    """``url``, else the manifest's, else the embedded server that ``llmserve up`` runs here for this manifest.

    Raises ``BusError`` with one line if there is none.
    """
    if url or manifest.spec.bus.url:
        return BusEndpoint(url or manifest.spec.bus.url or "", manifest.spec.bus.token)
    embedded = read_endpoint(state_dir(manifest, environ))
    if embedded is None:
        raise BusError(
            "no bus: give --nats URL or spec.bus.url, or start the deployment here with 'llmserve up' first"
        )
    return BusEndpoint(f"nats://127.0.0.1:{embedded.port}", embedded.credentials)
