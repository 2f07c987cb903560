"""Real stacks, each started once for all tests that share it."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.bench.path import vllm_server
from tests.processes import Stack, manifest_with, running

SMALL = {"engine.kv_space_gb": 0.5}
EXACT = {**SMALL, "kv_cache.prefix_caching": False, "models.primary.dtype": "fp32"}
"""Without prefix caching, so that every page is computed once and moved once; in fp32, whose greedy output does not
depend on which requests share a batch."""


@pytest.fixture(scope="session")
def pd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """manifests/local.yaml: one prefill and one decode worker on the CPU; with a parser of tool calls."""
    folder = tmp_path_factory.mktemp("pd")
    changes = {**SMALL, "gateway.tool_call_parser": "hermes"}
    stack = Stack(manifest_with("local.yaml", folder, changes), folder / "up.log")
    with running(stack):
        yield stack.ready()


@pytest.fixture(scope="session")
def client(pd: Stack) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{pd.url}/v1", api_key="none", timeout=120, max_retries=0)


@pytest.fixture(scope="package")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """``pd`` as ``EXACT`` has it, without a parser."""
    folder = tmp_path_factory.mktemp("exact")
    stack = Stack(manifest_with("local.yaml", folder, EXACT), folder / "up.log")
    with running(stack):
        yield stack.ready()


@pytest.fixture(scope="package")
def one_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of vLLM's own server with one engine, with the settings of ``exact``."""
    with vllm_server(tmp_path_factory.mktemp("vllm"), "--no-enable-prefix-caching", dtype="float32") as url:
        yield url
