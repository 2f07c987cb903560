"""Two independent servers that speak S3, as processes: moto's (Python) and s3rver (Node)."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.processes import BIN, ROOT, Process, free_port, wait_for

SERVERS = ("moto", "s3rver")
BUCKET = "pages"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "S3RVER", "AWS_SECRET_ACCESS_KEY": "S3RVER", "AWS_EC2_METADATA_DISABLED": "true"}
"""s3rver knows no others; moto takes any."""
_S3RVER = "3.7.1"
_NODE = {"NODE_OPTIONS": "--openssl-legacy-provider"}
"""s3rver makes its continuation tokens with a cipher that today's Node leaves out otherwise."""


@dataclass
class S3Server:
    """One that runs."""

    kind: str
    url: str
    process: Process


def s3rver_command(port: int, folder: Path) -> list[str]:
    """Installs s3rver at the first use; skips the test where there is no npm."""
    where = ROOT / "build" / "s3rver"
    program = where / "node_modules" / ".bin" / "s3rver"
    if not program.exists():
        npm = shutil.which("npm")
        if npm is None:
            pytest.skip("s3rver needs Node and npm, which are not here")
        where.mkdir(parents=True, exist_ok=True)
        install = [npm, "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(where), f"s3rver@{_S3RVER}"]
        subprocess.run(install, check=True, timeout=120)
    return [str(program), "-d", str(folder), "-a", "127.0.0.1", "-p", str(port), "--no-vhost-buckets"]


@contextmanager
def s3_server(kind: str, folder: Path) -> Iterator[S3Server]:
    """A server with an empty bucket ``BUCKET``. The process's environment gets credentials for it."""
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "moto":
        command = [str(BIN / "moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    else:
        command = s3rver_command(port, folder)
    os.environ.update(CREDENTIALS)
    process = Process(kind, command, folder / f"{kind}.log", CREDENTIALS | _NODE)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: _made_bucket(url), 30, f"{kind} answers: {process.log.read_text()[-500:]}")
        yield S3Server(kind, url, process)
    finally:
        process.kill()


def _made_bucket(url: str) -> bool:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    config = Config(retries={"total_max_attempts": 1}, connect_timeout=1, read_timeout=5)
    client = boto3.client("s3", endpoint_url=url, region_name="us-east-1", config=config)
    try:
        client.create_bucket(Bucket=BUCKET)
    except (BotoCoreError, ClientError):
        return False
    return True
