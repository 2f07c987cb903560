"""A draft model on both sides of a handoff, over the whole path; here the model itself, so that nearly every draft is
accepted."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import psutil
import pytest

from tests.e2e.conftest import EXACT
from tests.e2e.test_identity import prompt
from tests.made_up import made_up, made_up_model
from tests.processes import Stack, manifest_with, metrics, running, total, wait_for

pytestmark = pytest.mark.vllm

TOKENS = 25


@pytest.fixture(scope="module")
def drafting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("drafting")
    changes = {**EXACT, **made_up(), "models.draft": {"id": str(made_up_model()), "speculative_tokens": 3}}
    stack = Stack(manifest_with("local.yaml", folder, changes), folder / "up.log")
    with running(stack):
        yield stack.ready()


def streamed(stack: Stack, length: int) -> tuple[list[int], int]:
    """(token ids, events that brought some), of a greedy answer."""
    body = {
        "model": stack.model,
        "prompt": prompt(length),
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    tokens: list[int] = []
    events = 0
    with httpx.stream("POST", f"{stack.url}/v1/completions", json=body, timeout=120) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                new = json.loads(line.removeprefix("data: "))["choices"][0].get("token_ids") or []
                tokens += new
                events += bool(new)
    return tokens, events


@pytest.mark.parametrize("length", [127, 400])
def test_drafts_are_accepted_behind_a_handoff_and_change_no_token(drafting: Stack, exact: Stack, length: int) -> None:
    tokens, events = streamed(drafting, length)
    plain, plain_events = streamed(exact, length)
    assert len(tokens) == TOKENS
    assert tokens == plain
    assert events <= TOKENS / 2 < plain_events


def test_the_decode_worker_computes_no_prompt_and_all_pages_are_freed(drafting: Stack) -> None:
    streamed(drafting, 300)
    figures = metrics(drafting.metrics_url)
    assert total(figures, "llmserve_prefill_tokens_total", role="decode") == 0
    assert total(figures, "llmserve_transfer_bytes_total") > 0

    def used() -> float:
        return total(metrics(drafting.metrics_url), "llmserve_kv_pages", state="used")

    wait_for(lambda: used() == 0, 10, "all pages to be free")


def test_engines_die_with_the_process_that_started_them_though_it_is_killed(drafting: Stack) -> None:
    """The last test of that stack."""
    family = drafting.family()
    assert sum("EngineCore" in process.name() for process in family) >= 2, family
    drafting.kill()
    wait_for(lambda: not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE], 10, "all gone")
