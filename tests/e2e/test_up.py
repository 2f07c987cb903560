"""``llmserve up`` as a user runs it."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.processes import BIN, Stack, manifest_with, running, wait_for


@pytest.fixture(scope="module")
def sim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """For tests that leave it running, and the last one, which ends it."""
    folder = tmp_path_factory.mktemp("up")
    stack = Stack(manifest_with("sim.yaml", folder, {}), folder / "up.log")
    with running(stack):
        yield stack


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[Stack]:
    """For one test, which ends it."""
    stack = Stack(manifest_with("sim.yaml", tmp_path, {}), tmp_path / "up.log")
    with running(stack):
        yield stack


def llmserve(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN / "llmserve"), *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_it_shows_each_part_and_then_the_line_to_try(sim: Stack) -> None:
    start = time.monotonic()
    sim.ready(60)
    assert time.monotonic() - start < 30
    for part in ("nats", "router", "prefill-0", "decode-0", "gateway"):
        assert any(part in line and "ready" in line for line in sim.output.splitlines()), sim.output
    curl = sim.output[sim.output.index("curl ") :].split("\n\n")[0]
    answer = subprocess.run(curl, shell=True, capture_output=True, text=True, timeout=60, check=True)
    assert "data: [DONE]" in answer.stdout, answer


def test_ctrl_c_stops_everything_within_ten_seconds_even_under_load(mortal: Stack) -> None:
    mortal.ready(60)
    family = mortal.family()
    body = {"model": mortal.model, "prompt": "x", "max_tokens": 1000, "ignore_eos": True, "stream": True}
    with (
        httpx.Client(timeout=30) as client,
        client.stream("POST", f"{mortal.url}/v1/completions", json=body) as answer,
    ):
        next(answer.iter_lines())
        start = time.monotonic()
        mortal.child.send_signal(signal.SIGINT)
        assert mortal.child.wait(12) == 0
    assert time.monotonic() - start < 10
    wait_for(lambda: not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE], 2, "all gone")


def test_a_taken_port_is_one_clear_line_and_exit_code_2(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        manifest = manifest_with("sim.yaml", tmp_path, {"gateway.port": port})
        result = llmserve("up", "-f", str(manifest))
    assert result.returncode == 2
    assert str(port) in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("models.primary.dtype", "bf61", "bf16"),
        ("deployment.mode", "k8s", "not supported yet"),
        ("security.api_keys", ["env:LLMSERVE_TEST_NOT_SET"], "LLMSERVE_TEST_NOT_SET"),
    ],
)
def test_a_bad_manifest_is_one_clear_line_and_exit_code_2(
    tmp_path: Path, path: str, value: object, said: str
) -> None:
    result = llmserve("up", "-f", str(manifest_with("sim.yaml", tmp_path, {path: value})))
    assert result.returncode == 2
    assert path in result.stderr
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_the_state_of_one_deployment_is_not_shared_by_two(sim: Stack) -> None:
    sim.ready(60)
    second = manifest_with("sim.yaml", sim.manifest.parent, {})
    result = llmserve("up", "-f", str(second))
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


def test_status_names_every_member(sim: Stack) -> None:
    sim.ready(60)
    result = llmserve("status", "-f", str(sim.manifest))
    assert result.returncode == 0, result.stderr
    for role in ("gateway", "router", "prefill", "decode"):
        assert role in result.stdout


def test_kill_9_leaves_no_process_behind(sim: Stack) -> None:
    """The last test of it."""
    sim.ready(60)
    family = sim.family()
    sim.kill()
    wait_for(lambda: not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE], 5, "all gone")
