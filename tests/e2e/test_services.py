"""Every service of docker-compose.yml, started by its own command, serves together with the others."""

from __future__ import annotations

import time
from collections.abc import Iterator

import httpx
import pytest

from tests.processes import BIN, Process, answers, metrics, total, wait_for
from tests.services import Services

ROLES = ["gateway", "router", "prefill", "decode", "kv"]


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    services = Services(tmp_path_factory.mktemp("services"), changes={"engine.kv_space_gb": 0.5})
    try:
        services.start_all(ROLES)
        services.ready()
        yield services
    finally:
        services.end()


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
def test_each_answers_its_health_check(services: Services) -> None:
    for name in ROLES:
        assert answers(services.metrics_url(name).replace("/metrics", "/health/live")), name


@pytest.mark.vllm
def test_a_key_is_needed(services: Services) -> None:
    answer = httpx.get(f"{services.url}/v1/models", headers={"authorization": "Bearer wrong"})
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.vllm
def test_a_decode_worker_started_by_hand_gets_work_and_drains_on_sigterm(services: Services) -> None:
    command = [str(BIN / "llmserve-worker"), "--role", "decode", "--manifest", str(services.manifest)]
    command += ["--nats", services.nats_url, "--metrics-port", "0", "--name", "by-hand"]
    env = {"API_KEY": services.key, "NATS_URL": services.nats_url}
    by_hand = Process("by hand", command, services.folder / "by-hand.log", env)
    services.processes["by hand"] = by_hand
    line = by_hand.wait_for_line("ready after", 120)
    url = next(word for word in line.split() if word.startswith("http"))

    def served() -> bool:
        assert complete(services).status_code == 200
        return total(metrics(url), "llmserve_decode_tokens_total") > 0

    wait_for(served, 60, "work for the new worker")
    assert by_hand.stop(40) == 0
    assert complete(services).status_code == 200


@pytest.mark.vllm
def test_a_killed_worker_leaves_no_client_hanging_and_its_successor_serves(services: Services) -> None:
    for victim in ("decode", "prefill"):
        body = {"model": services.model, "prompt": [1000 + k for k in range(300)], "max_tokens": 400, "stream": True}
        body |= {"ignore_eos": True, "temperature": 0}
        with (
            httpx.Client(timeout=60, headers=services.headers) as client,
            client.stream("POST", f"{services.url}/v1/completions", json=body) as answer,
        ):
            lines = answer.iter_lines()
            next(lines)
            services.processes[victim].kill()
            start = time.monotonic()
            rest = list(lines)
        if victim == "decode":
            assert time.monotonic() - start < 12
            assert any("error" in line for line in rest), rest[-3:]
        else:
            assert "data: [DONE]" in rest
        services.start(victim)
        wait_for(lambda: answers(f"{services.url}/health/ready"), 120, "ready again")

        def served() -> bool:
            return complete(services).status_code == 200

        wait_for(served, 60, f"service after {victim} came back")
