"""A nats-server that an operator runs himself, with the accounts that ``llmserve tenant add`` prints; the services of
docker-compose.yml on it, with simulated engines."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from tests.processes import BIN, ROOT
from tests.services import Services


class Operator:
    """What an operator does: he adds tenants, keeps the server's configuration, and reloads."""

    def __init__(self, folder: Path) -> None:
        self.keys = folder / "keys"
        changes = {
            "engine": {"kind": "simulated", "kv_space_gb": 1, "simulated": {"step_ms": 1}},
            "security.api_keys_file": str(self.keys),
            "scheduling.fair_share.tenants": {"default": {}, "premium": {}},
        }
        self.services = Services(folder, changes=changes)
        url = self.services.nats_url.replace("//secret@", "//llmserve:secret@")
        self.services.variables["XDG_STATE_HOME"] = str(folder)
        self.services.nats_url = self.services.variables["NATS_URL"] = url
        self.config = folder / "nats.conf"
        self.services.commands["nats"] = f"nats-server -c {self.config}"

    def llmserve(self, *words: str, **variables: str) -> str:
        command = [str(BIN / "llmserve"), *words, "-f", str(self.services.manifest)]
        env = {**os.environ, **self.services.variables, **variables}
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def add(self, tenant: str) -> tuple[str, str]:
        """(API key, seed) of a new tenant, whom the server's configuration knows from now on."""
        printed = self.llmserve("tenant", "add", tenant)
        section = printed[printed.index("accounts {") :]
        shipped = (ROOT / "manifests/nats.conf").read_text()
        assert "authorization { token: $NATS_TOKEN }" in shipped
        self.config.write_text(shipped.replace("authorization { token: $NATS_TOKEN }", section))
        key, seed = (re.search(rf"^{name} +(\S+)$", printed, re.M) for name in ("API key", "NATS seed"))
        assert key is not None
        assert seed is not None
        return key[1], seed[1]

    def hang_up(self) -> None:
        """To the server, twice, each time until it has read its configuration."""
        for _ in range(2):
            before = self._loaded()
            self.services.processes["nats"].child.send_signal(signal.SIGHUP)
            until = time.monotonic() + 5
            while self._loaded() == before:
                assert time.monotonic() < until
                time.sleep(0.01)

    def status(self, key: str) -> int:
        """Of a chat with this API key."""
        body = {"model": self.services.model, "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
        url = f"{self.services.url}/v1/chat/completions"
        return httpx.post(url, json=body, headers={"authorization": f"Bearer {key}"}, timeout=30).status_code

    def submit(self, tenant: str, seed: str) -> str:
        """What ``llmserve submit`` says of two requests that the tenant publishes with its own credential."""
        folder = self.services.folder
        messages = [{"role": "user", "content": "x"}]
        body = {"model": self.services.model, "messages": messages, "max_tokens": 2}
        lines = [{"custom_id": str(i), "body": body} for i in range(2)]
        (folder / "in.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
        words = ["submit", str(folder / "in.jsonl"), "-o", str(folder / "out.jsonl"), "--tenant", tenant]
        return self.llmserve(*words, "--seed", "env:SEED", SEED=seed)

    def _loaded(self) -> str:
        return str(httpx.get(f"{self.services.monitor}/varz", timeout=5).json()["config_load_time"])


@pytest.fixture(scope="module")
def operator(tmp_path_factory: pytest.TempPathFactory) -> Operator:
    return Operator(tmp_path_factory.mktemp("external"))


@pytest.fixture(scope="module")
def premium(operator: Operator) -> Iterator[tuple[str, str]]:
    """(API key, seed) of a tenant whom the operator added before the start."""
    secrets = operator.add("premium")
    try:
        operator.services.start_all(["gateway", "router", "prefill", "decode"])
        operator.services.ready()
        yield secrets
    finally:
        operator.services.end()


def test_a_deployment_serves_and_takes_what_tenants_publish_on_it(
    operator: Operator, premium: tuple[str, str]
) -> None:
    key, seed = premium
    assert [operator.status(each) for each in (key, operator.services.key, "wrong")] == [200, 200, 401]
    assert "2 succeeded, 0 failed" in operator.submit("premium", seed)


def test_a_new_tenant_comes_in_while_everything_runs(operator: Operator, premium: tuple[str, str]) -> None:
    manifest = yaml.safe_load(operator.services.manifest.read_text())
    manifest["spec"]["scheduling"]["fair_share"]["tenants"]["late"] = {"limits": {"requests_per_minute": 1}}
    operator.services.manifest.write_text(yaml.safe_dump(manifest))
    key, seed = operator.add("late")
    assert operator.status(key) == 401
    operator.hang_up()
    assert "read again" in operator.llmserve("reload")
    assert [operator.status(key) for _ in range(2)] == [200, 429]
    assert "2 succeeded, 0 failed" in operator.submit("late", seed)
    assert "2 succeeded, 0 failed" in operator.submit("premium", premium[1])


def test_a_key_that_is_taken_out_lets_nobody_in_and_the_tenants_new_one_does(
    operator: Operator, premium: tuple[str, str]
) -> None:
    old = [line for line in operator.keys.read_text().splitlines() if line.endswith(" premium")]
    key, _ = operator.add("premium")
    operator.llmserve("reload")
    assert [operator.status(each) for each in (premium[0], key)] == [200, 200]
    rest = [line for line in operator.keys.read_text().splitlines() if line not in old]
    operator.keys.write_text("\n".join(rest) + "\n")
    operator.llmserve("reload")
    assert [operator.status(each) for each in (premium[0], key)] == [401, 200]
