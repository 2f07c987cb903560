"""Every service of docker-compose.yml, started by its own command, serves together with the others."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time

import aiohttp
import httpx
import pytest

from tests.bench.load import Stream, prompt_bodies, stream
from tests.e2e.conftest import LEASE_S
from tests.processes import BIN, answers, metrics, total, wait_for
from tests.services import Services

STREAMS = 24
TOKENS = 200
PROMPT_TOKENS = {"decode": 120, "prefill": 1200}
"""By who is killed: prompts are under way when the prefill worker is."""
BUSY = {"decode": 6, "prefill": 2}
"""Requests on that worker when it is killed."""
ROLES = ["gateway", "router", "prefill", "decode", "kv"]


def complete(services: Services, prompt_tokens: int = 300, **fields: object) -> httpx.Response:
    body = {"model": services.model, "prompt": [1000 + k for k in range(prompt_tokens)], "max_tokens": 8, **fields}
    return httpx.post(f"{services.url}/v1/completions", json=body, headers=services.headers, timeout=60)


@pytest.mark.vllm
def test_a_request_goes_through_them_and_its_pages_move_between_two_processes(services: Services) -> None:
    before = metrics(services.metrics_url("decode"))
    answer = complete(services)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 8
    wait_for(
        lambda: (
            total(metrics(services.metrics_url("decode")), "llmserve_transfer_bytes_total", engine="nixl")
            > total(before, "llmserve_transfer_bytes_total", engine="nixl")
        ),
        5,
        "the transfer to be counted",
    )


@pytest.mark.vllm
def test_status_says_which_engines_move_pages_and_why_others_do_not(services: Services) -> None:
    said = subprocess.run(
        [BIN / "llmserve", "status", "-f", services.manifest],
        env={**services.variables, "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    lines = [line for line in said.splitlines() if "pages move by" in line]
    assert len(lines) == 2, said
    for line in lines:
        # The same-host engine is off here.
        assert "nixl" in line.partition("pages move by")[2]
        assert "same_host" not in line


@pytest.mark.vllm
def test_each_answers_its_health_check(services: Services) -> None:
    for name in ROLES:
        assert answers(services.metrics_url(name).replace("/metrics", "/health/live")), name


@pytest.mark.vllm
def test_a_key_is_needed(services: Services) -> None:
    answer = httpx.get(f"{services.url}/v1/models", headers={"authorization": "Bearer wrong"})
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"


def running(services: Services, worker: str) -> float:
    return total(metrics(services.metrics_url(worker)), "llmserve_worker_requests", state="running")


async def killed_under_load(services: Services, victim: str) -> list[tuple[Stream, float]]:
    """Kill a worker amid streams that begin over a second, and start its successor at once.

    Returns each stream and how long after the kill it ended, if it had not ended before.
    """
    bodies = prompt_bodies(services.model, STREAMS, PROMPT_TOKENS[victim], TOKENS, seed=len(services.processes))
    timeout = aiohttp.ClientTimeout(total=150)
    async with aiohttp.ClientSession(headers=services.headers, timeout=timeout) as session:

        async def one(index: int) -> tuple[Stream, float]:
            await asyncio.sleep(index / STREAMS)
            body = {**bodies[index], "stream_options": {"include_usage": True}}
            ended = await stream(session, services.url, body)
            return ended, time.monotonic()

        tasks = [asyncio.create_task(one(index)) for index in range(STREAMS)]
        await asyncio.to_thread(wait_for, lambda: running(services, victim) >= BUSY[victim], 60, f"load on {victim}")
        services.processes[victim].kill()
        killed_s = time.monotonic()
        services.start(victim)
        return [(ended, at_s - killed_s) for ended, at_s in await asyncio.gather(*tasks)]


def settled(services: Services, workers: list[str]) -> None:
    """Nothing waits and every page is free a lease later, as the workers say and as the router heard."""

    def left() -> dict[str, float]:
        router = metrics(services.metrics_url("router"))
        figures = {
            "queued": total(router, "llmserve_queue_depth"),
            "in flight": total(router, "llmserve_tokens_in_flight"),
            "used, says the router": total(router, "llmserve_kv_pages", state="used"),
        }
        for worker in workers:
            figures[f"used in {worker}"] = total(
                metrics(services.metrics_url(worker)), "llmserve_worker_kv_pages", state="used"
            )
            figures[f"requests of {worker}"] = total(
                metrics(services.metrics_url(worker)), "llmserve_worker_requests"
            )
        return figures

    began_s = time.monotonic()
    wait_for(lambda: not any(left().values()), LEASE_S + 2, f"all pages to be free: {left()}")
    print(f"all pages free {time.monotonic() - began_s:.1f} s after the last stream's end")


def served(services: Services) -> bool:
    return complete(services).status_code == 200


@pytest.mark.vllm
@pytest.mark.parametrize("victim", ["decode", "prefill"])
async def test_when_the_only_worker_of_a_role_is_killed_under_load_nobody_hangs_and_its_successor_serves(
    services: Services, victim: str
) -> None:
    ended = await killed_under_load(services, victim)
    report(f"the only {victim} worker killed", ended)
    # What had begun on it ends within 10 s, and so does what comes to it later: a slow machine still prefills then.
    # What had not begun waits for the successor.
    failed = [(one, after_s) for one, after_s in ended if one.error]
    assert failed
    assert max(one.longest_pause_s if one.chunks else after_s for one, after_s in failed) < 10
    assert all("no live worker of role" in one.error for one, _ in failed), [one.error for one, _ in failed]
    if victim == "decode":
        assert any(one.chunks for one, _ in failed)
    assert {(one.finish_reason, one.output_tokens) for one, _ in ended if not one.error} <= {("length", TOKENS)}
    await asyncio.to_thread(wait_for, lambda: served(services), 120, f"service after {victim} came back")
    await asyncio.to_thread(settled, services, ["prefill", "decode"])


def report(what: str, ended: list[tuple[Stream, float]]) -> None:
    """For ``pytest -s``: what the clients saw."""
    failed = sorted(after_s for one, after_s in ended if one.error)
    pauses = sorted(one.longest_pause_s for one, _ in ended if not one.error)
    print(f"\n{what}: {len(failed)} of {len(ended)} streams in error", end="")
    if failed:
        print(f", {failed[0]:.1f} to {failed[-1]:.1f} s after it", end="")
    if pauses:
        print(f"; the others' longest pauses {pauses[0]:.1f} to {pauses[-1]:.1f} s", end="")
    print(f"; the last ended {max(after_s for _, after_s in ended):.1f} s after it")
