"""Pages that outlive the worker that computed them: kept, told to the router, found from there, loaded."""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.processes import BIN, Stack, metrics, total, wait_for
from tests.services import Services

pytestmark = pytest.mark.vllm

PAGE_TOKENS = 128
PAGES = 5
PROMPT = [2000 + number for number in range(PAGES * PAGE_TOKENS + 40)]
REUSED = PAGES * PAGE_TOKENS


@dataclass(frozen=True)
class Answer:
    text: str
    cached_tokens: int


def ask(url: str, model: str, prompt: list[int], headers: dict[str, str] | None = None) -> Answer:
    body = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0}
    answer = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    said: dict[str, Any] = answer.json()
    return Answer(
        said["choices"][0]["text"], (said["usage"]["prompt_tokens_details"] or {}).get("cached_tokens") or 0
    )


def served(services: Services) -> Answer:
    return ask(services.url, services.model, PROMPT, services.headers)


def figure(services: Services, part: str, name: str, **labels: str) -> float:
    return total(metrics(services.metrics_url(part)), name, **labels)


def known(services: Services, tier: str) -> float:
    """Pages in a tier, to the router."""
    return figure(services, "router", "llmserve_prefix_held_blocks", tier=tier)


def expected(services: Services, source: str) -> float:
    """Tokens that the router has found in its index when it placed prompts, by where they were."""
    return figure(services, "router", "llmserve_prefix_tokens_total", source=source)


def status(services: Services) -> str:
    command = [str(BIN / "llmserve"), "status", "-f", str(services.manifest), "--nats", services.nats_url]
    env = {**os.environ, **services.variables}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=True).stdout


def test_a_prompt_is_found_in_its_workers_memory_and_once_that_is_gone_on_disk(services: Services) -> None:
    before = {tier: known(services, tier) for tier in ("gpu", "dram", "nvme")}
    written = figure(services, "prefill", "llmserve_tier_stores_total", tier="disk")
    first = served(services)
    assert first.cached_tokens == 0

    def grown(tier: str) -> bool:
        return known(services, tier) >= before[tier] + PAGES

    # The worker has no request now, and tells of what it goes on with all the same.
    wait_for(
        lambda: figure(services, "prefill", "llmserve_tier_stores_total", tier="disk") >= written + PAGES,
        20,
        "writes",
    )
    for tier in before:
        wait_for(lambda tier=tier: grown(tier), 20, f"the router knows of the pages in {tier}")  # type: ignore[misc]

    # The engine runs in a thread of its worker: the gateway's names for the blocks are the engine's.
    # The router shows its counts a few times a second.
    time.sleep(1)
    found = expected(services, "gpu")
    assert served(services) == Answer(first.text, REUSED)
    wait_for(lambda: expected(services, "gpu") == found + REUSED, 5, "the router has placed it by what it knew")

    # Nobody is left who has seen the prompt.
    on_disk = known(services, "nvme")
    for name in ("prefill", "kv", "router"):
        services.processes[name].kill()
    for name in ("router", "kv", "prefill"):
        services.start(name)
    services.processes["prefill"].wait_for_line("ready after", 120)
    # More than before, if a worker was killed with pages of which it had not told yet.
    wait_for(lambda: known(services, "nvme") >= on_disk, 20, "the router knows what lies on disk")
    assert served(services) == Answer(first.text, REUSED)
    wait_for(lambda: expected(services, "nvme") == REUSED, 5, "the router has placed it by what it knew")
    reused = "llmserve_prompt_tokens_reused_total"
    wait_for(lambda: figure(services, "prefill", reused, source="loaded") == REUSED, 5, "the worker counts it")

    said = status(services)
    assert f"1 of 1 prompts placed at pages of theirs, {REUSED} tokens ({REUSED} nvme)" in said
    assert f"{REUSED} prompt tokens reused, {REUSED} of them loaded; disk: {PAGES} pages read" in said
    assert "disk: " in next(line for line in said.splitlines() if line.startswith("kv-") and " MB" in line)


def test_without_a_kv_role_pages_are_kept_and_loaded_and_a_new_one_finds_them(services: Services) -> None:
    services.processes["kv"].kill()
    prompt = [token + 3000 for token in PROMPT]
    on_disk = known(services, "nvme")
    stored = figure(services, "prefill", "llmserve_tier_stores_total", tier="disk")
    first = ask(services.url, services.model, prompt, services.headers)
    wait_for(
        lambda: figure(services, "prefill", "llmserve_tier_stores_total", tier="disk") >= stored + PAGES, 20, "writes"
    )
    services.start("kv")
    assert ask(services.url, services.model, prompt, services.headers) == Answer(first.text, REUSED)
    wait_for(lambda: known(services, "nvme") >= on_disk + PAGES, 20, "the router knows of them")


@pytest.mark.skipif("LLMSERVE_TIER_FAULTS" not in os.environ, reason="set LLMSERVE_TIER_FAULTS=1: half a minute")
def test_up_keeps_pages_with_a_kv_role_of_its_own_and_loads_them_when_it_is_started_again(pd: Stack) -> None:
    before = total(metrics(pd.metrics_url), "llmserve_storage_pages", tier="disk")
    first = ask(pd.url, pd.model, PROMPT)
    assert first.cached_tokens == 0
    kept = "llmserve_storage_pages"
    wait_for(lambda: total(metrics(pd.metrics_url), kept, tier="disk") >= before + PAGES, 20, "its pages are kept")
    assert ask(pd.url, pd.model, PROMPT) == Answer(first.text, REUSED)
    assert pd.stop() == 0
    pd.start_again()
    pd.ready()
    assert ask(pd.url, pd.model, PROMPT) == Answer(first.text, REUSED)
    loaded = "llmserve_prompt_tokens_reused_total"
    wait_for(lambda: total(metrics(pd.metrics_url), loaded, source="loaded") == REUSED, 5, "from the folder")
