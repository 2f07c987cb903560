"""The bus over TLS, with certificates on both sides, against a real nats-server."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmserve.bus.base import BusError
from llmserve.bus.nats import connect
from llmserve.bus.server import find_binary
from llmserve.bus.settings import BusSettings
from llmserve.manifests.schema import BusTls
from tests.certificates import Authority
from tests.processes import answers, free_port, wait_for


class TlsServer:
    """A nats-server that asks for certificates of its authority, and for a user."""

    def __init__(self, folder: Path, authority: Authority | None) -> None:
        self.port, self.monitor = free_port(), free_port()
        tls = ""
        if authority is not None:
            cert, key = authority.issue("server")
            tls = f'tls {{ cert_file: "{cert}", key_file: "{key}", ca_file: "{authority.file}", verify: true }}'
        config = folder / "nats.conf"
        config.write_text(f"""
            listen: "127.0.0.1:{self.port}"
            http: "127.0.0.1:{self.monitor}"
            jetstream {{ store_dir: "{folder / "js"}" }}
            authorization {{ users: [{{user: "me", password: "secret"}}] }}
            {tls}
        """)
        self.log = (folder / "nats.log").open("ab")
        self.process = subprocess.Popen([str(find_binary()), "-c", str(config)], stdout=self.log, stderr=self.log)
        wait_for(lambda: answers(f"http://127.0.0.1:{self.monitor}/healthz"), 10, "nats")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()
        self.log.close()


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def server(tmp_path: Path, authority: Authority) -> Iterator[TlsServer]:
    server = TlsServer(tmp_path, authority)
    yield server
    server.stop()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.02)


def files(authority: Authority) -> BusTls:
    cert, key = authority.issue("member", "member")
    return BusTls(ca=str(authority.file), cert=str(cert), key=str(key))


async def test_members_join_with_their_certificate_and_show_the_new_one_when_they_reconnect(
    server: TlsServer, authority: Authority
) -> None:
    import json
    import urllib.request

    def peers() -> list[str]:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.monitor}/connz?auth=true") as response:
            found = json.load(response)["connections"]
        return [c["tls_peer_certs"][0]["cert_sha256"] for c in found if c.get("tls_peer_certs")]

    settings = BusSettings(tls=files(authority), publish_patience_s=5)
    bus = await connect(f"nats://127.0.0.1:{server.port}", "me:secret", "d", member="m", settings=settings)
    await bus.round_trip_s()
    first = peers()
    authority.issue("member", "member")
    # Whatever ends a connection.
    bus._connection._client._transport._io_writer.transport.abort()  # type: ignore[union-attr]
    await until(lambda: bus.counters.reconnects > 0)
    await bus.round_trip_s()
    assert first
    assert peers() != first
    await bus.close()


@pytest.mark.parametrize("with_certificate", [True, False])
async def test_a_stranger_is_turned_away(
    server: TlsServer, authority: Authority, tmp_path: Path, with_certificate: bool
) -> None:
    mine = BusTls(ca=str(authority.file))
    if with_certificate:
        cert, key = Authority(tmp_path, "other").issue("stranger", "member")
        mine = BusTls(ca=str(authority.file), cert=str(cert), key=str(key))
    with pytest.raises(BusError):
        await connect(
            f"tls://127.0.0.1:{server.port}",
            "me:secret",
            "d",
            member="m",
            settings=BusSettings(tls=mine, publish_patience_s=0.5),
        )


async def test_a_server_of_another_authority_is_not_believed(server: TlsServer, tmp_path: Path) -> None:
    settings = BusSettings(tls=files(Authority(tmp_path, "other")), publish_patience_s=0.5)
    with pytest.raises(BusError, match="certificate"):
        await connect(f"tls://127.0.0.1:{server.port}", "me:secret", "d", member="m", settings=settings)


async def test_a_server_without_tls_does_not_hear_the_token(tmp_path: Path, authority: Authority) -> None:
    plain = TlsServer(tmp_path, None)
    try:
        settings = BusSettings(tls=files(authority), publish_patience_s=0.5)
        with pytest.raises(BusError, match="does not ask for TLS"):
            await connect(f"nats://127.0.0.1:{plain.port}", "me:secret", "d", member="m", settings=settings)
    finally:
        plain.stop()


async def test_files_that_are_not_there_are_named() -> None:
    settings = BusSettings(tls=BusTls(ca="/nowhere/ca.crt"), publish_patience_s=0.5)
    with pytest.raises(BusError, match=r"/nowhere/ca\.crt"):
        await connect("tls://127.0.0.1:1", None, "d", member="m", settings=settings)
