"""https, callers' certificates, and another certificate without a restart."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from llmserve.gateway import tls
from llmserve.gateway.http_bounds import HttpBounds
from llmserve.gateway.tls import ServerTls
from llmserve.manifests.errors import ManifestError
from llmserve.manifests.schema import GatewayTls
from tests.certificates import Authority
from tests.gateway.toy import Toy


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(await reader.read(100))
    await writer.drain()


async def serial(port: int, authority: Authority, client: tuple[Path, Path] | None = None) -> int:
    """Serial number of the certificate that the server shows; bytes go there and back."""
    from cryptography import x509

    context = ssl.create_default_context(cafile=str(authority.file))
    if client is not None:
        context.load_cert_chain(*map(str, client))
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    writer.write(b"hello")
    assert await reader.read(100) == b"hello"
    shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return x509.load_der_x509_certificate(shown).serial_number


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.02)


async def test_a_new_certificate_is_shown_to_the_next_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "LOOK_S", 0.05)
    authority = Authority(tmp_path)
    cert, key = authority.issue("server")
    served = ServerTls(GatewayTls(cert=str(cert), key=str(key)))
    server = await asyncio.start_server(echo, "127.0.0.1", 0, ssl=served.context)
    port = server.sockets[0].getsockname()[1]
    watching = asyncio.create_task(served.watch())
    first = await serial(port, authority)
    assert await serial(port, authority) == first
    authority.issue("server")
    stamps = served._seen
    await until(lambda: served._seen != stamps)
    assert await serial(port, authority) != first
    watching.cancel()
    server.close()


async def test_half_a_rotation_leaves_the_certificate_in_use(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("server")
    served = ServerTls(GatewayTls(cert=str(cert), key=str(key)))
    server = await asyncio.start_server(echo, "127.0.0.1", 0, ssl=served.context)
    port = server.sockets[0].getsockname()[1]
    first = await serial(port, authority)
    other = Authority(tmp_path, "other").issue("other")
    cert.write_bytes(other[0].read_bytes())
    with pytest.raises(ManifestError, match=r"spec\.gateway\.tls: .*server\.crt"):
        served.refresh()
    assert await serial(port, authority) == first
    server.close()


async def test_callers_without_a_certificate_of_the_authority_are_turned_away(tmp_path: Path) -> None:
    authority, strangers = Authority(tmp_path), Authority(tmp_path, "strangers")
    cert, key = authority.issue("server")
    files = GatewayTls(cert=str(cert), key=str(key), client_ca=str(authority.file))
    server = await asyncio.start_server(echo, "127.0.0.1", 0, ssl=ServerTls(files).context)
    port = server.sockets[0].getsockname()[1]
    await serial(port, authority, authority.issue("client", "caller"))
    for client in (None, strangers.issue("stranger", "caller")):
        with pytest.raises((ssl.SSLError, ConnectionError, AssertionError)):
            await serial(port, authority, client)
    server.close()


async def test_the_api_is_https_and_a_client_that_does_not_read_is_disconnected_there_too(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("server")
    toy, context = Toy(""), ssl.create_default_context(cafile=str(authority.file))
    bounds = HttpBounds(header_bytes=2048, header_timeout_s=1, write_timeout_s=0.3)
    async with (
        toy.served(bounds, ServerTls(GatewayTls(cert=str(cert), key=str(key)))) as (_, port),
        httpx.AsyncClient(verify=context, base_url=f"https://127.0.0.1:{port}") as client,
    ):
        assert (await client.post("/v1/chat/completions", content=b"12345")).text == "5"
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, limit=1024)
        writer.write(b"GET /endless HTTP/1.1\r\nhost: x\r\n\r\n")
        await until(lambda: bool(toy.registry.get_sample_value("llmserve_slow_clients_total")))
        writer.close()


@pytest.mark.parametrize("missing", ["cert", "key", "client_ca"])
def test_a_file_that_is_not_there_is_named(tmp_path: Path, missing: str) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("server")
    files = {"cert": str(cert), "key": str(key), "client_ca": str(authority.file)}
    files[missing] = "/nowhere/file.pem"
    with pytest.raises(ManifestError, match=r"/nowhere/file\.pem.*cannot be used"):
        ServerTls(GatewayTls(**files))
