"""Gateways that run batches: real NATS, the gateway's middleware and batch service, and a small model of an API."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import httpx
import openai
from fastapi import FastAPI, Request
from prometheus_client import CollectorRegistry
from starlette.responses import JSONResponse

from llmserve.bus.nats import NatsBus, connect
from llmserve.bus.server import EmbeddedServer
from llmserve.gateway.access import Access
from llmserve.gateway.batch_service import BatchService
from llmserve.gateway.caller import current_caller
from llmserve.gateway.errors import install_error_handlers
from llmserve.gateway.metrics import GatewayMetrics
from llmserve.gateway.middleware import GatewayMiddleware, RequestBounds
from llmserve.manifests.schema import Manifest
from tests.gateway.toy import Ready
from tests.manifests.samples import manifest

SPEC = (
    "scheduling: {fair_share: {tenants: {acme: {}, zeta: {}}}}, "
    "security: {api_keys: [{key: k-acme, tenant: acme}, {key: k-zeta, tenant: zeta}]}, "
    "gateway: {batch: {concurrency: 8}}"
)


class Model:
    """What every gateway's API does: it answers with the prompt, and counts who asked what."""

    def __init__(self) -> None:
        self.answered: list[tuple[str, str, str]] = []
        """(gateway, tenant, prompt)"""
        self.delay_s = 0.0
        self.busy = 0
        """So many requests to refuse."""

    def app(self, gateway: str) -> FastAPI:
        app = FastAPI()
        install_error_handlers(app)

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> JSONResponse:
            body = await request.json()
            caller = current_caller.get()
            assert caller is not None
            assert caller.klass == "batch"
            if self.busy:
                self.busy -= 1
                return JSONResponse({"error": {"message": "queue full"}}, 429)
            if body.get("model") != "m":
                return JSONResponse({"error": {"message": "no such model"}}, 404)
            prompt = body["messages"][0]["content"]
            await asyncio.sleep(self.delay_s)
            self.answered.append((gateway, caller.tenant, prompt))
            return JSONResponse({"choices": [{"message": {"role": "assistant", "content": prompt.upper()}}]})

        return app


class BatchGateway:
    """One gateway; ``client`` is OpenAI's own, without a socket between."""

    def __init__(self, name: str, bus: NatsBus, model: Model, found: Manifest) -> None:
        self.bus = bus
        self.registry = CollectorRegistry()
        metrics = GatewayMetrics(self.registry)
        app, access = model.app(name), Access.of(found, metrics)
        self.service = BatchService(found, bus, name, app, app, access, metrics)
        self.app = GatewayMiddleware(app, access, Ready(), metrics, RequestBounds(1 << 20, 10 << 20))

    def client(self, key: str) -> openai.AsyncOpenAI:
        http = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://gw")
        return openai.AsyncOpenAI(api_key=key, base_url="http://gw/v1", http_client=http, max_retries=0)  # type: ignore[arg-type]

    async def kill(self) -> None:
        """As if the process had died: nothing is given back."""
        await self.bus._connection._close_client()
        self.bus._connection.closed = True
        runner = self.service._runner
        for task in [*runner._running.values(), runner._task, *self.service._submissions._running]:
            if task is not None:
                task.cancel()


@contextlib.asynccontextmanager
async def gateway(server: EmbeddedServer, name: str, model: Model, spec: str = SPEC) -> AsyncIterator[BatchGateway]:
    bus = await connect(server.url, server.token, "d", member=name)
    made = BatchGateway(name, bus, model, manifest(spec))
    await made.service.start()
    try:
        yield made
    finally:
        await made.service.stop()
        await bus.close()


def request(custom_id: str, prompt: str, **body: object) -> dict[str, object]:
    message = {"role": "user", "content": prompt}
    whole = {"model": "m", "messages": [message], **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": whole}


def jsonl(lines: list[dict[str, object]]) -> bytes:
    return "\n".join(json.dumps(line) for line in lines).encode()


async def begin(client: openai.AsyncOpenAI, content: bytes) -> openai.types.Batch:
    file = await client.files.create(file=("in.jsonl", content), purpose="batch")
    return await client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"job": "7"}
    )


async def ended(client: openai.AsyncOpenAI, batch_id: str, timeout_s: float = 30) -> openai.types.Batch:
    async with asyncio.timeout(timeout_s):
        while True:
            batch = await client.batches.retrieve(batch_id)
            if batch.status in ("completed", "failed", "cancelled", "expired"):
                return batch
            await asyncio.sleep(0.05)


async def results(client: openai.AsyncOpenAI, file_id: str | None) -> list[dict[str, object]]:
    if file_id is None:
        return []
    text = (await client.files.content(file_id)).text
    return [json.loads(line) for line in text.splitlines()]
