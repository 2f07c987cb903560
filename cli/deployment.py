"""What the commands about a running deployment share: how it is named, and a bus to ask it on."""

from __future__ import annotations

import argparse
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from llmserve.bus.endpoint import bus_endpoint
from llmserve.bus.nats import NatsBus, connect
from llmserve.bus.settings import BusSettings
from llmserve.manifests.schema import Manifest

LISTEN_S = 1.3
"""Every member is heard once a second."""


def add_deployment_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--manifest", required=True, help="the manifest that the deployment was started with")
    parser.add_argument("--nats", metavar="URL", help="the bus; by default the manifest's, or the embedded one")


@asynccontextmanager
async def bus_of(manifest: Manifest, url: str | None, member: str) -> AsyncIterator[NatsBus]:
    """The deployment's bus. Raises ``BusError``."""
    settings = replace(BusSettings.from_manifest(manifest), publish_patience_s=3)
    endpoint = bus_endpoint(manifest, url, os.environ)
    bus = await connect(endpoint.url, endpoint.token, manifest.metadata.name, member=member, settings=settings)
    try:
        yield bus
    finally:
        await bus.close()
