"""Starting, watching and ending real processes in tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import yaml

BIN = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    """A TCP port of the loopback address that nobody uses right now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def wait_for(condition: Callable[[], object], timeout_s: float, what: str) -> None:
    """Poll until ``condition()`` is true; fail the test with ``what`` otherwise."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {timeout_s} s"
        time.sleep(0.05)


def answers(url: str) -> bool:
    """Whether the URL answers 200."""
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def metrics(url: str) -> dict[str, float]:
    """``name{labels}`` -> value of a Prometheus endpoint."""
    with urllib.request.urlopen(url, timeout=5) as response:
        lines = response.read().decode().splitlines()
    rows = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
    return {name: float(value) for name, value in rows}


def total(figures: Mapping[str, float], name: str, **labels: str) -> float:
    """Sum of a metric over all label sets that contain ``labels``."""
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    return sum(
        value
        for key, value in figures.items()
        if key.partition("{")[0] == name and all(label in key for label in wanted)
    )


class Process:
    """A child with its output in a file, in a process group of its own."""

    def __init__(self, name: str, command: list[str], log: Path, env: Mapping[str, str] | None = None) -> None:
        self.name = name
        self.log = log
        with log.open("ab") as out:
            self.child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                cwd=ROOT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.child.pid

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def family(self) -> list[psutil.Process]:
        """The process and all its descendants that live."""
        try:
            me = psutil.Process(self.pid)
            return [me, *me.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def wait_for_line(self, text: str, timeout_s: float) -> str:
        """The first line of output that contains ``text``."""

        def found() -> bool:
            assert self.child.poll() is None or text in self.output, f"{self.name} ended:\n{self.output[-4000:]}"
            return text in self.output

        wait_for(found, timeout_s, f"{self.name} to print {text!r}; it printed:\n{self.output[-4000:]}")
        return next(line for line in self.output.splitlines() if text in line)

    def kill(self) -> None:
        """``kill -9`` of this one process."""
        self.child.kill()
        self.child.wait()

    def stop(self, timeout_s: float = 30, sig: signal.Signals = signal.SIGTERM) -> int:
        """Signal it and wait; returns the exit status."""
        if self.child.poll() is None:
            self.child.send_signal(sig)
        return self.child.wait(timeout_s)

    def end(self) -> None:
        """Whatever it takes, for the end of a test."""
        family = self.family()
        if self.child.poll() is None:
            self.child.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.child.wait(15)
        for process in family:
            if process.is_running():
                process.kill()
        self.child.wait()


def manifest_with(source: str, folder: Path, changes: Mapping[str, Any]) -> Path:
    """A copy of a shipped manifest in ``folder`` with dotted paths below ``spec`` replaced, on ports of its own."""
    content = yaml.safe_load((ROOT / "manifests" / source).read_text())
    ports: dict[str, Any] = {"gateway.port": free_port(), "gateway.metrics_port": free_port()}
    state = {} if "bus.url" in changes else {"bus.state_dir": str(folder / "state")}
    for path, value in {**ports, **state, **changes}.items():
        *parents, last = path.split(".")
        part = content["spec"]
        for parent in parents:
            part = part.setdefault(parent, {})
        part[last] = value
    target = folder / f"manifest-{free_port()}.yaml"
    target.write_text(yaml.safe_dump(content))
    return target


class Stack(Process):
    """``llmserve up`` on a manifest."""

    def __init__(self, manifest: Path, log: Path, env: Mapping[str, str] | None = None) -> None:
        spec = yaml.safe_load(manifest.read_text())["spec"]
        self.manifest = manifest
        self.url = f"http://127.0.0.1:{spec['gateway']['port']}"
        self.metrics_url = f"http://127.0.0.1:{spec['gateway']['metrics_port']}/metrics"
        self.model = str(spec["models"]["primary"].get("served_name") or spec["models"]["primary"]["id"])
        self._env = env
        super().__init__("llmserve up", self.command(), log, env)

    def start_again(self) -> None:
        """After it was stopped, on the same manifest."""
        super().__init__(self.name, self.command(), self.log.with_name(f"again-{self.log.name}"), self._env)

    def command(self) -> list[str]:
        return [str(BIN / "llmserve"), "up", "-f", str(self.manifest)]

    def ready(self, timeout_s: float = 180) -> Stack:
        self.wait_for_line("curl ", timeout_s)
        return self


@contextmanager
def running(process: Process) -> Iterator[Process]:
    try:
        yield process
    finally:
        process.end()
