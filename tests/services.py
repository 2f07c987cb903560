"""The services of docker-compose.yml as processes of this machine, each by its own command."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

import yaml

from tests.processes import BIN, ROOT, Process, answers, free_port, manifest_with, wait_for


def substituted(text: str, variables: dict[str, str]) -> str:
    """``${NAME}``, ``${NAME:-default}`` and ``${NAME:?needed}`` as compose reads them."""

    def value(match: re.Match[str]) -> str:
        name, kind, rest = match.groups()
        if name in variables:
            return variables[name]
        assert kind == ":-", f"{name} is not set: {rest}"
        return str(rest)

    return re.sub(r"\$\{(\w+)(?:(:[-?])([^}]*))?\}", value, text)


class Services:
    """A deployment of separate processes; services may be started, killed and started again by name."""

    def __init__(
        self, folder: Path, source: str = "compose.yaml", changes: Mapping[str, object] | None = None
    ) -> None:
        self.folder = folder
        nats_port = free_port()
        self.key = "sk-test"
        self.nats_url = f"nats://secret@127.0.0.1:{nats_port}"
        fixed = {"gateway.host": "127.0.0.1", "bus.url": "env:NATS_URL", "security.api_keys": ["env:API_KEY"]}
        self.manifest = manifest_with(source, folder, {**fixed, **(changes or {})})
        spec = yaml.safe_load(self.manifest.read_text())["spec"]
        self.url = f"http://127.0.0.1:{spec['gateway']['port']}"
        self.model = str(spec["models"]["primary"].get("served_name") or spec["models"]["primary"]["id"])
        self.headers = {"authorization": f"Bearer {self.key}"}
        self.monitor = f"http://127.0.0.1:{free_port()}"
        self.metrics_ports = {name: free_port() for name in ("router", "prefill", "decode", "kv")}
        self.metrics_ports["gateway"] = spec["gateway"]["metrics_port"]
        self.variables = {
            "API_KEY": self.key,
            "NATS_TOKEN": "secret",
            "NATS_LISTEN": f"127.0.0.1:{nats_port}",
            "NATS_MONITOR": self.monitor.removeprefix("http://"),
            "NATS_STATE": str(folder / "nats"),
            "NATS_URL": self.nats_url,
            "LLMSERVE_MANIFEST": str(self.manifest),
            **{f"{name.upper()}_METRICS_PORT": str(port) for name, port in self.metrics_ports.items()},
        }
        self.commands = self._commands()
        self.processes: dict[str, Process] = {}
        self.urls = {"gateway": self.url}
        """Of the API of each gateway, by name."""
        self._starts = 0

    def _commands(self) -> dict[str, str]:
        compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
        return {
            name: substituted(service["command"], self.variables) for name, service in compose["services"].items()
        }

    def start(self, name: str, service: str | None = None, *options: str) -> Process:
        """Start a service's own command; ``service`` names another to run under this name, on a free port."""
        command = shlex.split(self.commands[service or name])
        if service == "gateway":
            port = free_port()
            command += ["--port", str(port), "--metrics-port", "0"]
            self.urls[name] = f"http://127.0.0.1:{port}"
        elif service:
            command[command.index("--metrics-port") + 1] = "0"
        command += options
        command[0] = str(BIN / command[0])
        env = {**self.variables, "PATH": f"{BIN}:{os.environ['PATH']}"}
        self._starts += 1
        self.processes[name] = Process(name, command, self.folder / f"{self._starts}-{name}.log", env)
        return self.processes[name]

    def metrics_url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.metrics_ports[name]}/metrics"

    def start_all(self, names: list[str]) -> None:
        self.start("nats")
        wait_for(lambda: answers(f"{self.monitor}/healthz"), 10, "nats")
        for name in names:
            self.start(name)

    def ready(self, timeout_s: float = 180) -> None:
        def ended() -> list[str]:
            return [f"{n}:\n{p.output[-2000:]}" for n, p in self.processes.items() if p.child.poll() is not None]

        def ready() -> bool:
            assert not ended(), "\n".join(ended())
            return answers(f"{self.url}/health/ready")

        wait_for(ready, timeout_s, "the gateway to be ready")

    def end(self) -> None:
        for process in reversed(list(self.processes.values())):
            process.end()
