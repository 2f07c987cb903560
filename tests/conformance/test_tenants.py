"""A tenant from the operator's command to its results, on a whole stack: keys, reload, batches, direct publishing."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import termios
import time
from pathlib import Path

import openai
import pytest

from tests.processes import BIN, Stack, metrics, total


def llmserve(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **variables}
    command = [str(BIN / "llmserve"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=env)


@pytest.fixture(scope="module")
def secrets(sim: Stack) -> dict[str, str]:
    """What ``llmserve tenant add`` prints, by its name; the gateway has read the keys again."""
    added = llmserve("tenant", "add", "premium", "-f", str(sim.manifest))
    assert added.returncode == 0, added.stderr
    found = dict(line.rsplit(maxsplit=1) for line in added.stdout.splitlines())
    client = openai.OpenAI(base_url=f"{sim.url}/v1", api_key=found["API key"], max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        client.models.list()
    reloaded = llmserve("reload", "-f", str(sim.manifest))
    assert reloaded.returncode == 0, reloaded.stdout + reloaded.stderr
    assert "read again" in reloaded.stdout
    assert [model.id for model in client.models.list()] == [sim.model]
    return found


def lines(sim: Stack, count: int) -> str:
    bodies = [
        {"model": sim.model, "messages": [{"role": "user", "content": f"Say {i}."}], "max_tokens": 4}
        for i in range(count)
    ]
    whole = [
        {"custom_id": f"r{i}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        for i, body in enumerate(bodies)
    ]
    return "\n".join(json.dumps(line) for line in whole)


def test_a_batch_of_openais_client_runs_through_the_whole_stack(sim: Stack, secrets: dict[str, str]) -> None:
    client = openai.OpenAI(base_url=f"{sim.url}/v1", api_key=secrets["API key"], max_retries=0)
    file = client.files.create(file=("in.jsonl", lines(sim, 20).encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    until = time.monotonic() + 60
    while batch.status != "completed":
        assert time.monotonic() < until, batch
        assert batch.status in ("validating", "in_progress", "finalizing"), batch
        time.sleep(0.2)
        batch = client.batches.retrieve(batch.id)
    assert batch.request_counts is not None
    assert batch.request_counts.completed == 20
    output = client.files.content(str(batch.output_file_id)).text.splitlines()
    answers = [json.loads(line) for line in output]
    assert [answer["custom_id"] for answer in answers] == [f"r{i}" for i in range(20)]
    assert all(answer["response"]["body"]["usage"]["completion_tokens"] == 4 for answer in answers)
    assert total(metrics(sim.metrics_url), "llmserve_batch_requests_total", tenant="premium", outcome="ok") == 20


def test_submit_publishes_as_the_tenant_and_a_second_time_runs_nothing(
    sim: Stack, secrets: dict[str, str], tmp_path: Path
) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(lines(sim, 12))

    def submit() -> subprocess.CompletedProcess[str]:
        words = ["submit", str(source), "-o", str(out), "-f", str(sim.manifest)]
        return llmserve(*words, "--tenant", "premium", "--seed", "env:SEED", SEED=secrets["NATS seed"])

    def ran() -> float:
        return total(metrics(sim.metrics_url), "llmserve_batch_requests_total", tenant="premium")

    before = ran()
    done = submit()
    assert done.returncode == 0, done.stderr
    assert "12 succeeded, 0 failed" in done.stdout
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert {answer["custom_id"] for answer in answers} == {f"r{i}" for i in range(12)}
    assert ran() - before == 12
    assert submit().returncode == 0
    again = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(again, key=lambda a: str(a["id"])) == sorted(answers, key=lambda a: str(a["id"]))
    assert ran() - before == 12


def test_submit_shows_its_progress_at_a_terminal(sim: Stack, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(lines(sim, 40))
    command = [str(BIN / "llmserve"), "submit", str(source), "-o", str(tmp_path / "out"), "-f", str(sim.manifest)]
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    with subprocess.Popen([*command, "--at-once", "2"], stdout=subprocess.DEVNULL, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # how a terminal ends
            while piece := os.read(ours, 4096):
                shown += piece
    os.close(ours)
    assert process.returncode == 0
    done = [int(count) for count in re.findall(rb"(\d+)/40", shown)]
    assert (done[0], done[-1]) == (0, 40)
    assert any(0 < count < 40 for count in done), done
    assert b"failed=0" in shown


@pytest.mark.parametrize(
    ("content", "said"),
    [("nonsense", "in.jsonl:1: is no JSON object"), ('{"custom_id": "a"}', "in.jsonl:1: body must be an object")],
)
def test_a_wrong_file_is_one_clear_line_and_exit_code_2(sim: Stack, tmp_path: Path, content: str, said: str) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(content)
    result = llmserve("submit", str(source), "-o", str(tmp_path / "out"), "-f", str(sim.manifest))
    assert (result.returncode, said in result.stderr, "Traceback" in result.stderr) == (2, True, False)


def test_an_unknown_tenant_is_one_clear_line_and_exit_code_2(sim: Stack) -> None:
    result = llmserve("tenant", "add", "nobody", "-f", str(sim.manifest))
    assert result.returncode == 2
    assert "'nobody' is no tenant" in result.stderr
    assert result.stdout == ""


def test_a_hangup_signal_reads_the_keys_again(sim: Stack) -> None:
    added = llmserve("tenant", "add", "default", "-f", str(sim.manifest))
    key = added.stdout.splitlines()[0].rsplit(maxsplit=1)[1]
    client = openai.OpenAI(base_url=f"{sim.url}/v1", api_key=key, max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        client.models.list()
    sim.child.send_signal(signal.SIGHUP)
    until = time.monotonic() + 10
    while True:
        try:
            assert [model.id for model in client.models.list()] == [sim.model]
            return
        except openai.AuthenticationError:
            assert time.monotonic() < until
            time.sleep(0.1)
