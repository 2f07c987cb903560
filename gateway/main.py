"""``llmserve-gateway``: one gateway as a process of its own, with no engine in it."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import resource
import secrets
import signal
import sys
import time
from collections.abc import Sequence

from msgspec.structs import replace

from llmserve.bus.base import BusError
from llmserve.bus.collector import loading
from llmserve.manifests.consistency import authenticates, is_loopback
from llmserve.manifests.errors import ManifestError
from llmserve.manifests.loader import load, resolve
from llmserve.manifests.models import ModelError
from llmserve.manifests.schema import Manifest

log = logging.getLogger("llmserve.gateway")


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; exit code 2 with one line on bad input."""
    parsed = _parser().parse_args(arguments)
    try:
        manifest = _read(parsed)
        import uvloop

        return uvloop.run(_serve(manifest, parsed))
    except (ManifestError, ModelError, BusError, OSError) as error:
        print(f"llmserve-gateway: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llmserve-gateway", description="Serve a deployment's OpenAI API.")
    parser.add_argument("--manifest", required=True, metavar="FILE")
    parser.add_argument(
        "--nats", metavar="URL", help="the bus; the manifest's, or that of 'llmserve up' here, otherwise"
    )
    parser.add_argument("--host", help="instead of spec.gateway.host")
    parser.add_argument("--port", type=int, help="instead of spec.gateway.port; 0 takes a free one")
    parser.add_argument("--metrics-port", type=int, help="instead of spec.gateway.metrics_port; 0 takes a free one")
    parser.add_argument("--json-log", action="store_true", help="log JSON lines even at a terminal")
    return parser


def _read(parsed: argparse.Namespace) -> Manifest:
    return _with_overrides(resolve(load(parsed.manifest), os.environ), parsed)


def _allow_many_connections() -> None:
    """Each stream holds a file; the usual soft limit of 1,024 is a leftover of ``select``."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _with_overrides(manifest: Manifest, parsed: argparse.Namespace) -> Manifest:
    gateway = manifest.spec.gateway
    for field in ("host", "port", "metrics_port"):
        value = getattr(parsed, field)
        if value is None:
            continue
        if isinstance(value, int) and not 0 <= value <= 65535:
            raise ManifestError([f"--{field.replace('_', '-')}: {value} is not a port, 0 to 65535 are"])
        gateway = replace(gateway, **{field: value})
    if not authenticates(manifest.spec.security) and not is_loopback(gateway.host):
        raise ManifestError(
            [f"host {gateway.host!r} can be reached from outside: give spec.security.api_keys, or use 127.0.0.1"]
        )
    return replace(manifest, spec=replace(manifest.spec, gateway=gateway))


async def _serve(manifest: Manifest, parsed: argparse.Namespace) -> int:
    from prometheus_client import CollectorRegistry

    from llmserve.bus.endpoint import bus_endpoint
    from llmserve.bus.nats import connect
    from llmserve.bus.settings import BusSettings
    from llmserve.bus.telemetry import MetricsServer, configure_logging
    from llmserve.gateway.gateway import Gateway
    from llmserve.gateway.log import BindCaller

    begun_s = time.monotonic()
    _allow_many_connections()
    configure_logging(json=parsed.json_log or not sys.stderr.isatty(), filters=(BindCaller(),))
    stopping = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stopping.set)
    member_id = f"gateway-{secrets.token_hex(6)}"
    endpoint = bus_endpoint(manifest, parsed.nats, os.environ)
    settings = BusSettings.from_manifest(manifest)
    bus = await connect(endpoint.url, endpoint.token, manifest.metadata.name, member=member_id, settings=settings)
    registry = CollectorRegistry()
    gateway = Gateway(manifest, bus, member_id, registry, read_manifest=lambda: _read(parsed))
    # A terminal that is closed sends it too, and means the end.
    if not os.isatty(0):
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, gateway.reload)
    metrics = MetricsServer(registry, manifest.spec.gateway.host, manifest.spec.gateway.metrics_port)
    try:
        with loading(10_000):  # a request costs a fifteenth less
            await metrics.start()
            await gateway.start()
        print(f"gateway on {gateway.url}, metrics on {metrics.url}, {time.monotonic() - begun_s:.1f} s", flush=True)
        serving = asyncio.create_task(gateway.serve())
        asked = asyncio.create_task(stopping.wait())
        await asyncio.wait((serving, asked), return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        await gateway.stop()
        await serving
        return 0
    finally:
        await metrics.stop()
        await bus.close()


if __name__ == "__main__":
    sys.exit(main())
