"""``llmserve-worker`` as a process, on a real nats-server with simulated engines."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest

from llmserve.bus.messages import AnyMessage, Deltas, Failed, Finished, Grant, Heartbeat, Role, Stage, encode
from llmserve.bus.nats import NatsBus, connect
from llmserve.bus.server import EmbeddedServer
from llmserve.workers.main import main
from tests.processes import BIN, Process, answers, manifest_with, metrics, total
from tests.workers.world import expected, request

PROMPT = list(range(1, 301))


class Deployment:
    """A nats-server, a connection to it, and worker processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server = EmbeddedServer(folder / "nats")
        self.manifest = manifest_with("sim.yaml", folder, {"engine.simulated.step_ms": 20})
        self.processes: list[Process] = []
        self.heard: list[AnyMessage] = []
        self.bus: NatsBus

    async def open(self) -> None:
        self.server.start()
        self.bus = await connect(self.server.url, self.server.token, "sim", member="test")
        subjects = self.bus.subjects
        for subject in (subjects.heartbeats, subjects.events, subjects.gateway("g1")):
            await self.bus.subscribe(subject, self.heard.append)

    async def close(self) -> None:
        for process in self.processes:
            process.end()
        await self.bus.close()
        self.server.stop()

    def start(
        self, role: str, *options: str, program: tuple[str, ...] = (str(BIN / "llmserve-worker"),), **env: str
    ) -> Process:
        command = [*program, "--role", role, "--manifest", str(self.manifest)]
        command += ["--nats", self.server.url, "--token", "env:BUS_TOKEN", *options]
        name = f"{role}-{len(self.processes)}"
        process = Process(name, command, self.folder / f"{name}.log", {"BUS_TOKEN": self.server.token, **env})
        self.processes.append(process)
        return process

    def beats(self, role: Role) -> list[Heartbeat]:
        return [message for message in self.heard if isinstance(message, Heartbeat) and message.role is role]

    async def joined(self, role: Role) -> Heartbeat:
        await self.until(lambda: self.beats(role), f"a heartbeat of {role}")
        return self.beats(role)[-1]

    async def until(self, condition: Callable[[], object], what: str, timeout_s: float = 30) -> None:
        end_s = time.monotonic() + timeout_s
        while not condition():
            logs = "\n".join(f"{process.name}: {process.output[-1500:]}" for process in self.processes)
            assert time.monotonic() < end_s, f"{what}: not within {timeout_s} s\n{logs}"
            await asyncio.sleep(0.02)

    async def grant(self, member: str, max_tokens: int, seq: int | None = None) -> int:
        item = request(prompt=PROMPT, max_tokens=max_tokens)
        seq = seq or await self.bus.accept(item, "default", "interactive")
        grant = Grant(
            epoch=1,
            seq=seq,
            tenant="default",
            klass="interactive",
            stage=Stage.WHOLE,
            attempt=0,
            request=encode(item),
        )
        self.bus.publish(self.bus.subjects.work(member), grant)
        return seq

    def tokens(self) -> list[int]:
        return [
            token
            for message in self.heard
            if isinstance(message, Deltas)
            for delta in message.items
            for token in delta.tokens
        ]

    def finished(self) -> list[Finished]:
        return [message for message in self.heard if isinstance(message, Finished)]


@pytest.fixture
async def deployment(tmp_path: Path) -> AsyncIterator[Deployment]:
    deployment = Deployment(tmp_path)
    await deployment.open()
    yield deployment
    await deployment.close()


async def exit_status(process: Process, timeout_s: float = 20) -> int:
    return await asyncio.to_thread(process.child.wait, timeout_s)


def metrics_url(process: Process) -> str:
    line = process.wait_for_line("ready", 30)
    return next(word for word in line.split() if word.startswith("http"))


async def test_a_worker_joins_serves_shows_metrics_and_drains_on_sigterm(deployment: Deployment) -> None:
    process = deployment.start("both", "--name", "w")
    beat = await deployment.joined(Role.BOTH)
    assert beat.member.startswith("w-")
    assert (beat.pid, beat.slots, beat.max_model_len) == (process.pid, 256, 2048)
    url = await asyncio.to_thread(metrics_url, process)
    assert url.endswith(f":{beat.metrics_port}/metrics")
    seq = await deployment.grant(beat.member, 40)
    await deployment.until(deployment.tokens, "tokens")
    process.child.send_signal(signal.SIGTERM)
    assert await exit_status(process) == 0
    await deployment.until(lambda: deployment.beats(Role.BOTH)[-1].leaving, "its farewell")
    assert deployment.tokens() == expected(PROMPT, 40)
    assert [end.seq for end in deployment.finished()] == [seq]
    assert await deployment.bus.fetch(seq) is None
    assert any(beat.draining for beat in deployment.beats(Role.BOTH))


async def test_the_metrics_port_answers_health_and_counts(deployment: Deployment) -> None:
    process = deployment.start("both")
    beat = await deployment.joined(Role.BOTH)
    await deployment.grant(beat.member, 5)
    await deployment.until(deployment.finished, "the end")
    url = await asyncio.to_thread(metrics_url, process)
    figures = await asyncio.to_thread(metrics, url)
    assert total(figures, "llmserve_prefill_tokens_total", role="both") == 300
    assert total(figures, "llmserve_decode_tokens_total", role="both") == 5
    assert total(figures, "llmserve_kv_page_bytes", role="both") > 0
    assert await asyncio.to_thread(answers, url.replace("/metrics", "/health/live"))


async def test_a_second_signal_stops_it_at_once(deployment: Deployment) -> None:
    process = deployment.start("both")
    beat = await deployment.joined(Role.BOTH)
    await deployment.grant(beat.member, 1500)
    await deployment.until(deployment.tokens, "tokens")
    process.child.send_signal(signal.SIGINT)
    await deployment.until(lambda: deployment.beats(Role.BOTH)[-1].draining, "draining")
    process.child.send_signal(signal.SIGINT)
    assert await exit_status(process, 10) == 130


async def test_kill_9_leaves_no_process_behind_and_its_subject_has_no_responders(deployment: Deployment) -> None:
    process = deployment.start("both")
    beat = await deployment.joined(Role.BOTH)
    family = process.family()
    process.kill()
    await deployment.until(lambda: not any(_lives(member) for member in family), "the end of all its processes")
    gone = asyncio.Event()
    grant = Grant(epoch=1, seq=1, tenant="t", klass="i", stage=Stage.WHOLE, attempt=0, request=b"")
    deployment.bus.publish(deployment.bus.subjects.work(beat.member), grant, no_responders=gone.set)
    await asyncio.wait_for(gone.wait(), 10)


@pytest.mark.parametrize("lock", ["released", "held"])
async def test_a_worker_whose_engine_hangs_in_a_thread_of_it_ends(deployment: Deployment, lock: str) -> None:
    """``held``: nothing in the process runs any more."""
    deployment.manifest = manifest_with("sim.yaml", deployment.folder, {"engine.stall_s": 1})
    process = deployment.start("both", program=(sys.executable, "-m", "tests.workers.hanging"), HANG=lock)
    beat = await deployment.joined(Role.BOTH)
    await asyncio.sleep(1.5)
    assert process.child.poll() is None  # without work it does not hang
    await deployment.grant(beat.member, 40)
    assert await exit_status(process) == 1
    if lock == "held":
        assert "Timeout (0:00:01)!" in process.output
        assert "hanging.py" in process.output  # where it hung
        return
    await deployment.until(lambda: any(isinstance(m, Failed) and m.died for m in deployment.heard), "its report")
    assert "engine died: it hangs: 1 requests" in process.output


def _lives(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


async def test_a_standby_router_takes_over_when_the_leader_leaves_and_when_it_is_killed(
    deployment: Deployment,
) -> None:
    async def leader() -> str:
        return (await deployment.bus.leader())[0]

    async def leads(prefix: str) -> None:
        end_s = time.monotonic() + 20
        while not (await leader()).startswith(prefix):
            assert time.monotonic() < end_s, f"{prefix} does not lead, {await leader()!r} does"
            await asyncio.sleep(0.05)

    first = deployment.start("router", "--name", "one")
    await leads("one-")
    second = deployment.start("router", "--name", "two")
    await deployment.until(
        lambda: any(beat.member.startswith("two-") for beat in deployment.beats(Role.ROUTER)), "two"
    )
    await asyncio.sleep(1.5)
    assert (await leader()).startswith("one-")
    assert await asyncio.to_thread(first.stop) == 0
    await leads("two-")
    deployment.start("router", "--name", "three")
    await asyncio.sleep(1.5)
    second.kill()
    await leads("three-")


async def test_router_and_workers_as_processes_serve_a_request_from_the_stream(deployment: Deployment) -> None:
    for role in ("router", "prefill", "decode"):
        deployment.start(role)
    await deployment.joined(Role.DECODE)
    await deployment.joined(Role.PREFILL)
    alive = Heartbeat(member="g1", role=Role.GATEWAY, host="h", pid=1)
    deployment.bus.publish(deployment.bus.subjects.heartbeats, alive)
    await deployment.bus.accept(request(prompt=PROMPT, max_tokens=12), "default", "interactive")
    await deployment.until(lambda: len(deployment.tokens()) == 12, "12 tokens")
    assert deployment.tokens() == expected(PROMPT, 12)
    prefill, decode = deployment.processes[1:]
    moved = await asyncio.to_thread(metrics, await asyncio.to_thread(metrics_url, decode))
    assert total(moved, "llmserve_prefill_tokens_total") == 0
    assert total(moved, "llmserve_transfer_bytes_total") == 3 * total(moved, "llmserve_kv_page_bytes")
    for process in (prefill, decode):
        assert await asyncio.to_thread(process.stop) == 0


async def test_the_kv_role_joins_answers_its_health_check_and_leaves(deployment: Deployment) -> None:
    process = deployment.start("kv")
    beat = await deployment.joined(Role.KV)
    line = await asyncio.to_thread(process.wait_for_line, "metrics", 20)
    url = next(word for word in line.split() if word.startswith("http"))
    assert await asyncio.to_thread(answers, url.replace("/metrics", "/health/live"))
    assert await asyncio.to_thread(process.stop) == 0
    assert beat.role is Role.KV


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--manifest", "/nowhere.yaml"], ["/nowhere.yaml", "cannot be read"]),
        (["--name", "a.b"], ["--name", "'a.b'", "letters"]),
        (["--metrics-port", "70000"], ["--metrics-port", "70000", "65535"]),
        (["--drain-s", "-1"], ["--drain-s", "-1", "0"]),
        (["--token", "env:LLMSERVE_NO_SUCH"], ["--token", "LLMSERVE_NO_SUCH"]),
        ([], ["no bus", "--nats"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    options: list[str], words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    manifest = manifest_with("sim.yaml", tmp_path, {})
    assert main(["--role", "decode", "--manifest", str(manifest), *options]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1, error
    assert all(word in error for word in words), error


def test_an_unknown_role_is_exit_code_2(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--role", "cook", "--manifest", "m.yaml"])
    assert caught.value.code == 2
    assert "cook" in capfd.readouterr().err
