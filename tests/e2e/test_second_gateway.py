"""A second gateway on the bus of the first, with other settings: a reasoning parser, and a key for each tenant."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.processes import BIN, Process, Stack, answers, free_port, manifest_with, running, wait_for

pytestmark = pytest.mark.vllm

ASK: Any = [{"role": "user", "content": "What is the weather in Paris? Use the tool."}]
KEYS = {"default": "k-default", "premium": "k-premium"}
THOUGHTS = "Here is my thought process: [a-z ]{4,12} Here is my response: [A-Z][a-z]{3,8}"
"""In the words of Granite, whose parser needs no tokens of its own."""


@pytest.fixture(scope="module")
def second(pd: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its URL."""
    folder = tmp_path_factory.mktemp("second")
    state = str(pd.manifest.parent / "state")
    port = free_port()
    changes = {
        "gateway.reasoning_parser": "granite",
        "gateway.port": port,
        "bus.state_dir": state,
        "security.api_keys": [{"key": key, "tenant": tenant} for tenant, key in KEYS.items()],
    }
    command = [str(BIN / "llmserve-gateway"), "--manifest", str(manifest_with("local.yaml", folder, changes))]
    process = Process("gateway", command, folder / "gateway.log")
    with running(process):
        url = f"http://127.0.0.1:{port}"
        process.wait_for_line("serving on", 120)
        wait_for(lambda: answers(f"{url}/health/ready"), 20, "the second gateway to be ready")
        yield url


def client_of(url: str, tenant: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEYS[tenant], timeout=120, max_retries=0)


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_is_told_from_the_answer(second: str, pd: Stack, stream: bool) -> None:
    client = client_of(second, "default")
    asked: dict[str, Any] = {
        "model": pd.model,
        "messages": ASK,
        "temperature": 0,
        "max_tokens": 40,
        "extra_body": {"structured_outputs": {"regex": THOUGHTS}},
    }
    if stream:
        deltas = [
            chunk.choices[0].delta.model_dump() for chunk in client.chat.completions.create(**asked, stream=True)
        ]
        thought = "".join(delta.get("reasoning") or "" for delta in deltas)
        said = "".join(delta.get("content") or "" for delta in deltas)
    else:
        message = client.chat.completions.create(**asked).choices[0].message.model_dump()
        thought, said = message["reasoning"], message["content"]
    # Streaming, Granite's parser lets the first word of the mark through.
    assert re.fullmatch("[a-z ]{4,12}( ?Here)?", thought.strip()), (thought, said)
    assert re.fullmatch("[A-Z][a-z]{3,8}", said.strip()), (thought, said)


def test_a_salt_divides_a_tenants_cache_and_reaches_no_other_tenants(second: str, pd: Stack) -> None:
    prompt = [5000 + 11 * index % 4000 for index in range(400)]

    def cached(tenant: str, salt: str) -> bool:
        answer = client_of(second, tenant).completions.create(
            model=pd.model, prompt=prompt, max_tokens=2, extra_body={"cache_salt": salt}
        )
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        return bool(answer.usage.prompt_tokens_details.cached_tokens)

    asked = [("default", "s"), ("default", "s"), ("premium", "s"), ("premium", "s"), ("default", "t")]
    assert [cached(*each) for each in asked] == [False, True, False, True, False]
