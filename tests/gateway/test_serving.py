"""The gateway behind a real socket, inside a process that belongs to somebody else."""

from __future__ import annotations

import asyncio
import signal
import socket

import httpx
import openai
import pytest
from msgspec.structs import replace
from prometheus_client import CollectorRegistry

from llmserve.bus.messages import Heartbeat, Role
from llmserve.gateway.gateway import Gateway
from tests.gateway.conftest import KEYS, manifest
from tests.gateway.fake import FakeBus, Script


async def test_clients_stream_from_it_and_leave_and_it_stops_without_touching_the_process() -> None:
    bus, registry = FakeBus(), CollectorRegistry()
    served = manifest()
    served = replace(served, spec=replace(served.spec, gateway=replace(served.spec.gateway, max_body_kb=256)))
    gateway = Gateway(served, bus, "gw2", registry, drain_s=1.0)
    before = signal.getsignal(signal.SIGINT)
    await gateway.start()
    url = gateway.url
    serving = asyncio.create_task(gateway.serve())
    tokenizer = gateway.engine.renderer.tokenizer
    bus.on_accept = Script(bus, [*tokenizer.encode("Hello there, friend."), tokenizer.eos_token_id])
    try:
        async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=KEYS["acme"], max_retries=0) as client:
            stream = await client.chat.completions.create(
                model="smol", messages=[{"role": "user", "content": "Hi"}], stream=True
            )
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert text == "Hello there, friend."
        assert gateway._socket is not None
        assert gateway._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert signal.getsignal(signal.SIGINT) is before
        assert bus.cancelled() == []
        # A large body stops uvicorn from reading for a while.
        for stop_after, padding_bytes in ((0, 0), (2, 0), (2, 200_000)):
            bus.on_accept = Script(bus, [1, 2, 3], stop_after=stop_after)
            await _hang_up(gateway, bus, padding_bytes)
        assert len(gateway.channel) == 0
        assert bus.stored == {}
        outcome = {"tenant": "acme", "outcome": "disconnected", "status": "200"}
        assert registry.get_sample_value("llmserve_requests_total", outcome) == 3
    finally:
        await asyncio.wait_for(gateway.stop(), 10)
        await asyncio.wait_for(serving, 10)
    beats = [m for _, m in bus.published if isinstance(m, Heartbeat) and m.role is Role.GATEWAY]
    assert beats[-1].leaving
    assert not beats[0].leaving
    with pytest.raises(httpx.ConnectError):
        await httpx.AsyncClient().get(f"{url}/health/live")


async def _hang_up(gateway: Gateway, bus: FakeBus, padding_bytes: int) -> None:
    """Ask on a plain connection, end it when the response has begun, and wait until the request is cancelled."""
    bus.accepted.clear()
    host, port = gateway.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = b'{"model":"smol","messages":[{"role":"user","content":"Hi"}],"stream":true%b}' % (b" " * padding_bytes)
    head = f"host: x\r\nauthorization: Bearer {KEYS['acme']}\r\ncontent-type: application/json\r\n"
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\n%bcontent-length: %d\r\n\r\n%b" % (head.encode(), len(body), body)
    )
    await reader.readuntil(b"\r\n\r\n")
    writer.close()
    async with asyncio.timeout(10):
        while bus.accepted[0].request.request_id not in bus.cancelled() or bus.stored:
            await asyncio.sleep(0.01)


async def test_open_responses_are_cancelled_when_it_stops() -> None:
    bus = FakeBus()
    gateway = Gateway(manifest(), bus, "gw3", CollectorRegistry(), drain_s=1.0)
    await gateway.start()
    serving = asyncio.create_task(gateway.serve())
    headers = {"authorization": f"Bearer {KEYS['acme']}"}
    async with httpx.AsyncClient(headers=headers, timeout=20) as client:
        body = {"model": "smol", "prompt": "x"}
        asking = asyncio.create_task(client.post(f"{gateway.url}/v1/completions", json=body))
        async with asyncio.timeout(10):
            while not bus.accepted:
                await asyncio.sleep(0.01)
        await asyncio.wait_for(gateway.stop(), 10)
        await asyncio.wait_for(serving, 10)
        await asyncio.gather(asking, return_exceptions=True)
    assert bus.cancelled() == [bus.accepted[0].request.request_id]
    assert bus.stored == {}


async def test_a_port_that_is_taken_is_an_error_before_anything_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        gateway = Gateway(manifest(), FakeBus(), "gw4", CollectorRegistry(), port=taken.getsockname()[1])
        with pytest.raises(OSError, match="in use"):
            await gateway.start()
