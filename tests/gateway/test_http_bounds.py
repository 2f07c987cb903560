"""What a connection and a request may cost: bytes of headers and body, and time."""

from __future__ import annotations

import asyncio
import socket
import time

import pytest

from llmserve.gateway.http_bounds import HttpBounds
from llmserve.gateway.middleware import RequestBounds
from tests.gateway.toy import CHAT, Toy

BOUNDS = HttpBounds(header_bytes=2048, header_timeout_s=0.3, write_timeout_s=0.5)


async def answer(address: tuple[str, int], *parts: bytes) -> bytes:
    """What comes back on one connection until it is closed."""
    reader, writer = await asyncio.open_connection(*address)
    for part in parts:
        writer.write(part)
        await asyncio.sleep(0.01)
    data = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    return data


@pytest.mark.parametrize(
    "parts",
    [
        [b"GET / HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 3000 + b"\r\n\r\n"],
        [b"GET /" + b"y" * 3000 + b" HTTP/1.1\r\nhost: x\r\n\r\n"],
        [b"GET / HTTP/1.1\r\nhost: x\r\nx: ", *[b"y" * 500] * 6],
    ],
    ids=["one header", "a long URL", "one that never ends"],
)
async def test_headers_beyond_the_limit_are_431(parts: list[bytes]) -> None:
    async with Toy("").served(BOUNDS) as address:
        data = await answer(address, *parts)
    assert data.startswith(b"HTTP/1.1 431")
    assert b'"type":"RequestHeadersTooLargeError"' in data


@pytest.mark.parametrize("parts", [[], [b"GET / HTTP/1.1\r\nhost:"]], ids=["silent", "half a header"])
async def test_headers_that_do_not_come_are_408(parts: list[bytes]) -> None:
    async with Toy("").served(BOUNDS) as address:
        assert (await answer(address, *parts)).startswith(b"HTTP/1.1 408")


async def test_a_second_request_of_a_connection_has_its_own_headers_and_time() -> None:
    request = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\nx: " + b"y" * 1500 + b"\r\n\r\nbody"
    last = request.replace(b"host", b"connection: close\r\nhost")
    async with Toy("").served(BOUNDS) as address:
        assert (await answer(address, request, request, last)).count(b"HTTP/1.1 200") == 3


async def test_a_large_body_is_no_header() -> None:
    head = b"POST / HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 100000\r\n\r\n"
    async with Toy("").served(BOUNDS) as address:
        assert (await answer(address, head, *[b"b" * 20000] * 5)).endswith(b"100000\r\n0\r\n\r\n")


async def test_garbage_is_400_in_openais_shape() -> None:
    async with Toy("").served(BOUNDS) as address:
        data = await answer(address, b"\x16\x03\x01 hello\r\n\r\n")
    assert data.startswith(b"HTTP/1.1 400")
    assert b'"error"' in data


async def test_a_client_that_does_not_read_is_disconnected() -> None:
    toy = Toy("")
    async with toy.served(BOUNDS) as address:
        client = socket.create_connection(address)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(b"GET /endless HTTP/1.1\r\nhost: x\r\n\r\n")
        began = time.monotonic()
        while not toy.registry.get_sample_value("llmserve_slow_clients_total"):
            assert time.monotonic() - began < 5
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.1)
        assert toy.registry.get_sample_value("llmserve_open_requests") == 0
        client.close()


async def test_a_body_that_does_not_come_is_408() -> None:
    toy = Toy("", RequestBounds(body_bytes=1000, file_bytes=1000, body_timeout_s=0.2))
    head = b"POST / HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 10\r\n\r\nhalf"
    async with toy.served(BOUNDS) as address:
        data = await answer(address, head)
    assert data.startswith(b"HTTP/1.1 408")
    assert b"did not arrive within 0.2 s" in data


async def test_a_response_that_takes_too_long_is_504() -> None:
    toy = Toy("", RequestBounds(body_bytes=1000, file_bytes=1000, request_timeout_s=0.1))
    response = await toy.post("/slow")
    assert (response.status_code, response.json()["error"]["type"]) == (504, "TimeoutError")


async def test_a_file_may_be_larger_than_a_body() -> None:
    toy = Toy("", RequestBounds(body_bytes=10, file_bytes=100))
    sizes = [(path, size) for path in (CHAT, "/v1/files") for size in (10, 50, 101)]
    statuses = [(await toy.post(path, body=b"x" * size)).status_code for path, size in sizes]
    assert statuses == [200, 413, 413, 200, 200, 413]
