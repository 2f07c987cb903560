"""Two gateways of one deployment, https and all: limits that hold over both, certificates that change."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import pytest
import yaml

from llmserve.gateway.spending import REPORT_S
from llmserve.gateway.tls import LOOK_S
from tests.certificates import Authority
from tests.processes import BIN, Process, Stack, free_port, manifest_with, running, wait_for

REQUESTS_A_MINUTE = 30
TOKENS_A_MINUTE = 3000
PROMPT, ANSWER = list(range(1000, 1020)), 30
COST = len(PROMPT) + ANSWER
ASK: dict[str, object] = {"model": "smol", "prompt": PROMPT, "max_tokens": ANSWER, "ignore_eos": True}
MANIFEST: dict[str, object] = {
    "models.primary.served_name": "smol",
    "scheduling.fair_share.tenants": {
        "default": {},
        "hasty": {"limits": {"requests_per_minute": REQUESTS_A_MINUTE}},
        "wordy": {"limits": {"tokens_per_minute": TOKENS_A_MINUTE}},
    },
    "security.api_keys": [{"key": f"k-{tenant}", "tenant": tenant} for tenant in ("default", "hasty", "wordy")],
}


@dataclass
class Two:
    """A deployment with a second gateway."""

    urls: list[str]
    authority: Authority
    manifest: Path
    processes: tuple[Process, Process]

    def client(self, tenant: str) -> httpx.AsyncClient:
        trust = ssl.create_default_context(cafile=str(self.authority.file))
        return httpx.AsyncClient(verify=trust, headers={"authorization": f"Bearer k-{tenant}"}, timeout=30)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    folder = tmp_path_factory.mktemp("gateways")
    authority = Authority(folder)
    cert, key = authority.issue("server")
    manifest = manifest_with("sim.yaml", folder, {**MANIFEST, "gateway.tls": {"cert": str(cert), "key": str(key)}})
    stack = Stack(manifest, folder / "up.log")
    with running(stack):
        stack.ready(60)
        port = free_port()
        command = [str(BIN / "llmserve-gateway"), "--manifest", str(manifest), "--port", str(port)]
        second = Process("gateway", [*command, "--metrics-port", str(free_port())], folder / "gateway.log")
        with running(second):
            urls = [stack.url.replace("http:", "https:"), f"https://127.0.0.1:{port}"]
            for url in urls:
                wait_for(partial(_is_well, url, authority), 60, f"{url}:\n{second.output[-2000:]}")
            yield Two(urls, authority, manifest, (stack, second))


def health(url: str, authority: Authority | None) -> int:
    """Exit status of the command."""
    trust = [] if authority is None else ["--ca", str(authority.file)]
    command = [str(BIN / "llmserve"), "health", f"{url}/health/ready", *trust]
    return subprocess.run(command, capture_output=True, check=False).returncode


def _is_well(url: str, authority: Authority) -> bool:
    return health(url, authority) == 0


async def test_two_gateways_share_the_requests_of_a_minute(two: Two) -> None:
    """Beyond the limit goes at most what both accept between two reports, however much more they are asked."""
    per_s, seconds = 8, 5.0
    passed = 0
    async with two.client("hasty") as client:

        async def ask(url: str, after_s: float) -> None:
            nonlocal passed
            await asyncio.sleep(after_s)
            answer = await client.post(f"{url}/v1/completions", json={**ASK, "max_tokens": 2})
            assert answer.status_code in (200, 429), answer.text
            if answer.status_code == 429:
                assert int(answer.headers["retry-after"]) >= 1
            passed += answer.status_code == 200

        begun_s = time.monotonic()
        times = [index / per_s for index in range(round(per_s * seconds))]
        await asyncio.gather(*(ask(url, after_s) for url in two.urls for after_s in times))
        refilled = (time.monotonic() - begun_s) * REQUESTS_A_MINUTE / 60
    error = len(two.urls) * per_s * REPORT_S
    print(f"\n{passed} of {len(times) * 2} let through, {REQUESTS_A_MINUTE + refilled:.0f} + {error:.0f} at most")
    assert REQUESTS_A_MINUTE <= passed <= REQUESTS_A_MINUTE + refilled + error
    # Each for itself would have let more through.
    assert REQUESTS_A_MINUTE + refilled + error < 2 * REQUESTS_A_MINUTE


async def test_two_gateways_share_the_tokens_of_a_minute(two: Two) -> None:
    first, second = (f"{url}/v1/completions" for url in two.urls)
    async with two.client("wordy") as client:
        spent = await asyncio.gather(*(client.post(first, json=ASK) for _ in range(TOKENS_A_MINUTE // COST)))
        assert {answer.status_code for answer in spent} == {200}
        # Spent at the one, reported to the other.
        await asyncio.sleep(REPORT_S * 1.5)
        refused = await client.post(second, json={**ASK, "max_tokens": TOKENS_A_MINUTE // 2})
    assert refused.status_code == 429, refused.text
    assert "tokens per minute" in refused.json()["error"]["message"]


async def test_a_new_tenant_is_served_by_both_without_a_restart(two: Two) -> None:
    manifest = yaml.safe_load(two.manifest.read_text())
    manifest["spec"]["scheduling"]["fair_share"]["tenants"]["late"] = {"limits": {"max_context_tokens": 60}}
    manifest["spec"]["security"]["api_keys"].append({"key": "k-late", "tenant": "late"})
    before = [process.family() for process in two.processes]
    async with two.client("late") as client:
        for expected in (401, 200):
            answers = [await client.post(f"{url}/v1/completions", json=ASK) for url in two.urls]
            assert [answer.status_code for answer in answers] == [expected] * 2, answers[0].text
            two.manifest.write_text(yaml.safe_dump(manifest))
            command = [str(BIN / "llmserve"), "reload", "-f", str(two.manifest)]
            told = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=True)
            assert told.stdout.count("read again") == 2, told.stdout
        answer = await client.post(f"{two.urls[1]}/v1/completions", json={**ASK, "prompt": PROMPT * 4})
    assert answer.status_code == 400, answer.text
    assert [process.family() for process in two.processes] == before


def test_health_asks_an_https_gateway_only_with_its_authority(two: Two) -> None:
    assert [health(url, two.authority) for url in two.urls] == [0, 0]
    assert health(two.urls[0], None) == 1


async def test_a_new_certificate_is_shown_while_streams_go_on(two: Two) -> None:
    """A client whose connection is open notices nothing; the next one sees the new certificate."""

    def shown() -> bytes:
        address = ("127.0.0.1", int(two.urls[0].rpartition(":")[2]))
        return ssl.get_server_certificate(address, ca_certs=str(two.authority.file)).encode()

    old = await asyncio.to_thread(shown)
    ask = {**ASK, "max_tokens": 1900, "stream": True, "stream_options": {"include_usage": True}}
    body = b""
    async with two.client("default") as client:
        async with client.stream("POST", f"{two.urls[0]}/v1/completions", json=ask) as answer:
            chunks = answer.aiter_bytes()
            body += await anext(chunks)
            two.authority.issue("server")
            deadline_s = time.monotonic() + LOOK_S + 5
            while (new := await asyncio.to_thread(shown)) == old:
                assert time.monotonic() < deadline_s, "the old certificate is still shown"
                body += await anext(chunks)
            async for chunk in chunks:
                body += chunk
        assert (await client.get(f"{two.urls[0]}/v1/models")).status_code == 200
    assert new != old
    assert body.endswith(b"data: [DONE]\n\n")
    assert b'"completion_tokens":1900' in body
