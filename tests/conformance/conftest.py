"""Stacks for tests that no one here wrote."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator

import pytest

from llmserve.manifests.secrets import add_to_key_file
from tests.processes import Stack, manifest_with, running

KEY = "sk-conformance"


@pytest.fixture(scope="session")
def sim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Simulated engines, for what does not depend on the model; a key is asked for."""
    folder = tmp_path_factory.mktemp("sim")
    add_to_key_file(folder / "keys", "unused", "premium")
    changes = {
        "security.api_keys": [KEY],
        "security.api_keys_file": str(folder / "keys"),
        "engine.simulated.step_ms": 0.5,
        "gateway.tool_call_parser": "hermes",
    }
    stack = Stack(manifest_with("sim.yaml", folder, changes), folder / "up.log")
    with running(stack):
        yield stack.ready()


@pytest.fixture(scope="session")
def document(sim: Stack) -> dict[str, object]:
    """Our OpenAPI document."""
    request = urllib.request.Request(f"{sim.url}/openapi.json", headers={"authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request, timeout=10) as response:
        found: dict[str, object] = json.load(response)
    return found
