"""One gateway for the whole session, since building vLLM's server takes seconds; its bus is emptied for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec
import pytest
from prometheus_client import CollectorRegistry
from starlette.datastructures import State

from llmserve.bus.messages import Heartbeat, Role
from llmserve.gateway.gateway import Gateway
from llmserve.gateway.middleware import GatewayMiddleware
from llmserve.manifests.schema import Manifest
from tests.gateway.fake import FakeBus, Script

KEYS = {"acme": "key-of-acme", "zeta": "key-of-zeta", "small": "key-of-small", "default": "key-of-nobody"}


def manifest() -> Manifest:
    return msgspec.convert(
        {
            "metadata": {"name": "test"},
            "spec": {
                "models": {"primary": {"id": "smollm2-135m", "served_name": "smol", "max_model_len": 512}},
                "deployment": {"replicas": {"prefill": 1}},
                "scheduling": {
                    "fair_share": {
                        "tenants": {"small": {"limits": {"tokens_per_minute": 1000, "max_context_tokens": 100}}}
                    }
                },
                "gateway": {"port": 0, "max_body_kb": 64, "tool_call_parser": "hermes"},
                "security": {
                    "api_keys": [
                        KEYS["default"],
                        {"key": KEYS["acme"], "tenant": "acme"},
                        {"key": KEYS["zeta"], "tenant": "zeta"},
                        {"key": KEYS["small"], "tenant": "small"},
                    ]
                },
            },
        },
        Manifest,
    )


@dataclass
class World:
    """The gateway under test and what is around it."""

    gateway: Gateway
    app: GatewayMiddleware
    bus: FakeBus
    client: httpx.AsyncClient
    registry: CollectorRegistry

    @property
    def state(self) -> State:
        """What vLLM's server keeps its serving classes in."""
        return self.gateway.app_state

    def encode(self, text: str) -> list[int]:
        """The tokens of ``text`` and the one that ends a turn, whose text vLLM leaves out."""
        tokenizer = self.gateway.engine.renderer.tokenizer
        ids: list[int] = tokenizer.encode(text)
        return [*ids, tokenizer.eos_token_id]

    def yields(self, text: str, *, stop_after: int | None = None) -> Script:
        """From now on every accepted request yields ``text``."""
        script = Script(self.bus, self.encode(text), stop_after=stop_after)
        self.bus.on_accept = script
        return script

    def beat(self, role: Role, **fields: Any) -> None:
        beat = Heartbeat(member=f"m-{role.value}", role=role, host="h", pid=1, **fields)
        self.bus.publish(self.bus.subjects.heartbeats, beat)

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0


@pytest.fixture(scope="session")
async def session_world() -> AsyncIterator[World]:
    bus, registry = FakeBus(), CollectorRegistry()
    gateway = Gateway(manifest(), bus, "gw", registry, deadline_s=4.0)
    app = await gateway.build()
    headers = {"authorization": f"Bearer {KEYS['acme']}"}
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://gw", headers=headers, timeout=30) as client:
        yield World(gateway, app, bus, client, registry)
    await gateway.stop()


@pytest.fixture
def world(session_world: World) -> World:
    bus = session_world.bus
    bus.accepted.clear()
    bus.stored.clear()
    bus.published.clear()
    bus.refuse.clear()
    bus.on_accept = lambda _: None
    bus.delay_s = 0.0
    return session_world
