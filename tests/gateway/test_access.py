"""Who is let in, with which limits, and how that changes while requests are served."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from msgspec.structs import replace

from llmserve.bus.memory import MemoryBroker
from llmserve.bus.messages import AnyMessage, Reload, Reloaded
from llmserve.gateway.identity import api_keys
from llmserve.gateway.limits import TenantLimits
from llmserve.gateway.reload import Reloader
from llmserve.gateway.spending import SpendingReports
from llmserve.manifests.errors import ManifestError
from llmserve.manifests.schema import Limits, Manifest, Security, Tenant
from llmserve.manifests.secrets import add_to_key_file, hash_of, new_key, read_key_file
from tests.gateway.toy import CHAT, Toy
from tests.manifests.samples import manifest

TENANTS = "scheduling: {{fair_share: {{tenants: {{acme: {{limits: {{{limits}}}}}, zeta: {{}}}}}}}}"
KEYS = "security: {api_keys: [{key: k-acme, tenant: acme}, {key: k-zeta, tenant: zeta}]}"


def toy(limits: str = "") -> Toy:
    return Toy(f"{TENANTS.format(limits=limits)}, {KEYS}")


async def test_many_keys_name_one_tenant_and_a_hash_is_as_good_as_its_key() -> None:
    keys = f"{{key: '{hash_of('k1')}', tenant: acme}}, {{key: k2, tenant: acme}}"
    gateway = Toy(f"{TENANTS.format(limits='')}, security: {{api_keys: [{keys}]}}")
    assert [(await gateway.post(CHAT, key)).status_code for key in ("k1", "k2", hash_of("k1"), "")] == [
        200,
        200,
        401,
        401,
    ]


def test_a_key_file_holds_hashes_only_and_its_mistakes_are_named(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    key = new_key()
    add_to_key_file(file, key, "acme")
    assert key not in file.read_text()
    assert file.stat().st_mode & 0o077 == 0
    assert read_key_file(file)[0].tenant == "acme"
    file.write_text("# comment\n\nnot a hash\n")
    with pytest.raises(ManifestError, match="keys:3: must be sha256:HEX TENANT"):
        read_key_file(file)


def test_a_key_file_of_an_unknown_tenant_or_without_keys_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    found = manifest(f"security: {{api_keys_file: {file}}}")
    file.write_text("")
    with pytest.raises(ManifestError, match="holds no key"):
        api_keys(found)
    add_to_key_file(file, "k", "nobody")
    with pytest.raises(ManifestError, match="'nobody' is no tenant: default"):
        api_keys(found)


async def test_limits_are_told_and_a_refusal_says_when_to_try_again() -> None:
    gateway = toy("requests_per_minute: 1")
    first, second = await gateway.post(CHAT, "k-acme"), await gateway.post(CHAT, "k-acme")
    assert first.headers["x-ratelimit-remaining-requests"] == "0"
    assert (second.status_code, second.headers["retry-after"]) == (429, "60")
    assert second.json()["error"]["code"] == "rate_limit_exceeded"
    assert second.headers["x-ratelimit-limit-requests"] == "1"
    assert (await gateway.post(CHAT, "k-zeta")).status_code == 200
    assert "x-ratelimit-limit-requests" not in (await gateway.post(CHAT, "k-zeta")).headers


async def test_looking_at_models_and_counting_tokens_is_free() -> None:
    gateway = toy("requests_per_minute: 1")
    headers = {"authorization": "Bearer k-acme"}
    for _ in range(3):
        assert (await gateway.client.get("/v1/models", headers=headers)).status_code == 200
        assert (await gateway.post("/tokenize", "k-acme")).status_code == 200
    assert (await gateway.post(CHAT, "k-acme")).status_code == 200


async def test_open_requests_are_counted_until_they_end() -> None:
    gateway = toy("concurrency: 1")
    slow = asyncio.create_task(gateway.post("/slow", "k-acme"))
    await asyncio.sleep(0.05)
    assert (await gateway.post(CHAT, "k-acme")).status_code == 429
    assert (await slow).status_code == 200
    assert (await gateway.post(CHAT, "k-acme")).status_code == 200


async def test_a_model_that_is_not_the_tenants_is_not_there() -> None:
    gateway = toy("models: [other]")
    headers = {"authorization": "Bearer k-acme"}
    refused = await gateway.post(CHAT, "k-acme")
    assert (refused.status_code, refused.json()["error"]["message"]) == (404, "The model `m` does not exist.")
    assert (await gateway.client.get("/v1/models", headers=headers)).json() == {"object": "list", "data": []}
    assert (await gateway.client.get("/v1/models/m", headers=headers)).status_code == 404
    assert (await gateway.post(CHAT, "k-zeta")).status_code == 200


async def test_a_reload_lets_new_keys_in_and_old_ones_out(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    add_to_key_file(file, "old", "acme")
    gateway = Toy(f"{TENANTS.format(limits='')}, security: {{api_keys_file: {file}}}")
    assert (await gateway.post(CHAT, "old")).status_code == 200
    file.unlink()
    add_to_key_file(file, "new", "acme")
    gateway.access.change(gateway.manifest)
    assert [(await gateway.post(CHAT, key)).status_code for key in ("old", "new")] == [401, 200]


async def test_a_reload_is_answered_with_what_changed_and_what_needs_a_restart() -> None:
    broker = MemoryBroker()
    bus, operator = broker.bus("gw"), broker.bus("op")
    gateway = toy("requests_per_minute: 1")
    answers: list[AnyMessage] = []
    await operator.subscribe(operator.subjects.gateway("op"), answers.append)
    wanted: list[Manifest | ManifestError] = []

    def read() -> Manifest:
        found = wanted.pop()
        if isinstance(found, ManifestError):
            raise found
        return found

    reloader = Reloader(bus, "gw", gateway.metrics, gateway.manifest, read, gateway.access.change)
    await reloader.start()
    spec = f"{TENANTS.format(limits='requests_per_minute: 5')}, security: {{api_keys: [x]}}, gateway: {{port: 8001}}"
    for found in (manifest(spec), ManifestError(["m.yaml:1: wrong"])):
        wanted.append(found)
        operator.publish(operator.subjects.admin, Reload(reply_to="op"))
        await asyncio.sleep(0.01)
    done, refused = answers
    assert isinstance(done, Reloaded)
    assert done.changed == ["spec.security", "spec.scheduling.fair_share.tenants limits"]
    assert done.restart == ["spec.gateway"]
    assert isinstance(refused, Reloaded)
    assert refused.problem == "m.yaml:1: wrong"
    assert [(await gateway.post(CHAT, key)).status_code for key in ("k-acme", "x")] == [401, 200]


def test_a_refused_reload_changes_nothing(tmp_path: Path) -> None:
    access = toy().access
    before = access.identity
    wrong = toy().manifest
    security = Security(api_keys_file=str(tmp_path / "missing"))
    wrong = replace(wrong, spec=replace(wrong.spec, security=security))
    with pytest.raises(ManifestError):
        access.change(wrong)
    assert access.identity is before


async def test_two_gateways_share_one_limit() -> None:
    broker = MemoryBroker()
    tenants = {"acme": Tenant(limits=Limits(requests_per_minute=2, concurrency=2))}
    limits = [TenantLimits(tenants, 0.0) for _ in range(2)]
    reports = [SpendingReports(broker.bus(f"g{i}"), f"g{i}", limits[i]) for i in range(2)]
    for report in reports:
        await report.start()
    first, second = limits[0].of("acme"), limits[1].of("acme")
    assert first is not None
    assert second is not None
    now = asyncio.get_running_loop().time()
    first.enter(now)
    first.enter(now)
    reports[0].report()
    await asyncio.sleep(0.01)
    assert dict(second.headers(now))[b"x-ratelimit-remaining-requests"] == b"0"
    first.leave()
    first.leave()
    reports[0].report()
    for report in reports:
        await report.stop()
