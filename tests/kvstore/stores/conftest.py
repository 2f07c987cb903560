"""A store of each kind, over real files and real servers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from llmserve.kvstore.stores.base import PageStore
from llmserve.kvstore.stores.filesystem import FilesystemStore, direct_problem
from llmserve.kvstore.stores.s3 import S3Store
from tests.s3_servers import BUCKET, SERVERS, S3Server, s3_server

_numbers = iter(range(10**6))


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server("moto", tmp_path_factory.mktemp("moto")) as running:
        yield running


@pytest.fixture(scope="session")
def s3rver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server("s3rver", tmp_path_factory.mktemp("s3rver")) as running:
        yield running


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest) -> S3Server:
    found: S3Server = request.getfixturevalue(request.param)
    return found


def s3_store(server: S3Server, **options: object) -> S3Store:
    """An empty store of its own prefix."""
    options = {"region": "us-east-1", "endpoint_url": server.url, "prefix": f"test{next(_numbers)}", **options}
    return S3Store("object", BUCKET, **options)  # type: ignore[arg-type]


@pytest.fixture(params=["files", "synced", "direct", *SERVERS])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[PageStore]:
    kind = request.param
    made: PageStore
    if kind in SERVERS:
        made = s3_store(request.getfixturevalue(kind))
    else:
        if kind == "direct" and (problem := direct_problem(tmp_path)):
            pytest.skip(problem)
        made = FilesystemStore("disk", tmp_path, fsync=kind == "synced", direct=kind == "direct")
    yield made
    await made.close()
