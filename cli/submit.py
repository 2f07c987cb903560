"""``llmserve submit``: run a file of requests as batch work, over NATS, and write the results as they come."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
from tqdm import tqdm

from llmserve.bus.base import BusError
from llmserve.bus.endpoint import bus_endpoint
from llmserve.bus.publisher import Json, Publisher
from llmserve.manifests.errors import ManifestError
from llmserve.manifests.loader import load, resolve


class _BadFile(Exception):
    """The file is no list of requests; the message is one line."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="requests as OpenAI's batch API has them, a line each")
    parser.add_argument("-o", "--output", type=Path, required=True, help="file for the results, a line each")
    parser.add_argument("-f", "--manifest", required=True, help="the manifest of the deployment")
    parser.add_argument("--tenant", default="default", help="whose requests they are")
    parser.add_argument("--nats", metavar="URL", help="the bus; by default the manifest's, or the embedded one")
    parser.add_argument("--seed", metavar="env:NAME", help="variable with the tenant's NATS seed; ours otherwise")
    parser.add_argument("--at-once", type=int, default=256, metavar="N", help="requests on their way at once")


def run(arguments: argparse.Namespace) -> int:
    """0 if every request was answered with 200, 1 if not, 2 on bad input."""
    try:
        requests = list(_requests(arguments.file))
        return asyncio.run(_submit(arguments, requests))
    except (ManifestError, BusError, OSError, _BadFile, ValueError) as error:
        print(error, file=sys.stderr)
        return 2


async def _submit(arguments: argparse.Namespace, requests: list[Json]) -> int:
    manifest = resolve(load(arguments.manifest), os.environ)
    if arguments.tenant not in manifest.spec.scheduling.fair_share.tenants:
        raise ManifestError([f"--tenant: {arguments.tenant!r} is no tenant of {arguments.manifest}"])
    if arguments.at_once < 1:
        raise ManifestError([f"--at-once: {arguments.at_once} must be at least 1"])
    endpoint = bus_endpoint(manifest, arguments.nats, os.environ)
    seed = None
    if arguments.seed is not None:
        name = arguments.seed.removeprefix("env:")
        seed = os.environ.get(name)
        if not arguments.seed.startswith("env:") or not seed:
            raise ManifestError([f"--seed: must be env:NAME of a variable that is set; got env:{name}"])
    succeeded = failed = 0
    publisher = Publisher(
        endpoint.url, manifest.metadata.name, arguments.tenant, seed=seed, credentials=endpoint.token
    )
    with arguments.output.open("wb") as output, tqdm(total=len(requests), unit="req", disable=None) as bar:
        async with publisher:
            async for result in publisher.run(requests, arguments.at_once):
                output.write(msgspec.json.encode(result) + b"\n")
                output.flush()
                response = result.get("response")
                fine = isinstance(response, dict) and response.get("status_code") == 200
                succeeded, failed = succeeded + fine, failed + (not fine)
                bar.set_postfix(failed=failed, refresh=False)
                bar.update()
    print(f"{succeeded} succeeded, {failed} failed: {arguments.output}")
    return 1 if failed else 0


def _requests(path: Path) -> Iterator[Json]:
    """The lines, each with an id that is the same when the same file is submitted again."""
    ids: set[object] = set()
    with path.open("rb") as file:
        for number, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                line = msgspec.json.decode(text, type=dict[str, object])
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                raise _BadFile(f"{path}:{number}: is no JSON object: {error}") from error
            if not isinstance(line.get("body"), dict):
                raise _BadFile(f"{path}:{number}: body must be an object")
            custom_id = line.get("custom_id")
            if not isinstance(custom_id, str) or not custom_id:
                raise _BadFile(f"{path}:{number}: custom_id must be text")
            if custom_id in ids:
                raise _BadFile(f"{path}:{number}: custom_id {custom_id!r} stands twice")
            ids.add(custom_id)
            yield {**line, "id": hashlib.sha256(b"%d %b" % (number, text.strip())).hexdigest()}
