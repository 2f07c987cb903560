"""Web tokens of a real issuer in the place of API keys."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import jwt
import pytest

from llmserve.gateway import oidc
from tests.gateway.issuer import Issuer
from tests.gateway.toy import CHAT, Toy

TENANTS = "scheduling: {fair_share: {tenants: {acme: {}, zeta: {}}}}"
USERS: dict[str, dict[str, object]] = {
    "alice": {"tenant": "acme"},
    "bob": {"tenant": "nobody"},
    "carol": {},
    "dave": {"tenant": ["acme"]},
}


@pytest.fixture(scope="module")
def issuer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Issuer]:
    issuer = Issuer(tmp_path_factory.mktemp("issuer"), USERS)
    issuer.start()
    yield issuer
    issuer.end()


@pytest.fixture
def gateway(issuer: Issuer) -> Toy:
    found = f"{{issuer: '{issuer.url}', audience: llmserve}}"
    return Toy(f"{TENANTS}, security: {{oidc: [{found}], api_keys: [{{key: k, tenant: zeta}}]}}")


def tenants_served(gateway: Toy) -> set[str]:
    samples = next(iter(gateway.metrics.requests.collect())).samples
    return {s.labels["tenant"] for s in samples if s.name.endswith("_total") and s.labels["status"] == "200"}


async def status(gateway: Toy, token: str) -> int:
    return (await gateway.post(CHAT, token)).status_code


async def test_a_token_of_the_issuer_names_its_tenant_and_keys_go_on_working(gateway: Toy, issuer: Issuer) -> None:
    assert await status(gateway, issuer.token("alice", "llmserve")) == 200
    assert tenants_served(gateway) == {"acme"}
    assert await status(gateway, "k") == 200
    assert tenants_served(gateway) == {"acme", "zeta"}


@pytest.mark.parametrize("user", ["bob", "carol", "dave"])
async def test_a_token_without_a_tenant_of_ours_is_forbidden(gateway: Toy, issuer: Issuer, user: str) -> None:
    response = await gateway.post(CHAT, issuer.token(user, "llmserve"))
    assert response.status_code == 403
    assert response.json()["error"]["type"] == "PermissionDeniedError"


async def test_a_token_for_another_audience_is_refused(gateway: Toy, issuer: Issuer) -> None:
    response = await gateway.post(CHAT, issuer.token("alice", "another"))
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert "udience" in response.json()["error"]["message"]


async def test_forged_tokens_are_refused(gateway: Toy, issuer: Issuer) -> None:
    from cryptography.hazmat.primitives.asymmetric import rsa
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    good = issuer.token("alice", "llmserve")
    claims = jwt.decode(good, options={"verify_signature": False})
    assert await status(gateway, good) == 200
    keys = gateway.access.identity._tokens._providers[issuer.url][1]._keys  # type: ignore[union-attr]
    [key_id], [key] = keys.keys(), keys.values()
    public = key.key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    mine = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    import base64
    import hashlib
    import hmac
    import json

    def hs256() -> str:
        """Signed with the issuer's public key as if it were a shared secret."""
        parts = [{"alg": "HS256", "typ": "JWT", "kid": key_id}, claims]
        text = b".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in parts)
        signature = hmac.digest(public, text, hashlib.sha256)
        return (text + b"." + base64.urlsafe_b64encode(signature).rstrip(b"=")).decode()

    forged = {
        "none": jwt.encode(claims, "", algorithm="none"),
        "another key": jwt.encode(claims, mine, algorithm="RS256", headers={"kid": key_id}),
        "a key without a name": jwt.encode(claims, mine, algorithm="RS256"),
        "an unknown key": jwt.encode(claims, mine, algorithm="RS256", headers={"kid": "mine"}),
        "another issuer": jwt.encode({**claims, "iss": "https://evil"}, mine, algorithm="RS256"),
        "a secret": hs256(),
        "no signature": good.rpartition(".")[0] + ".",
        "garbage": "a.b.c",
        "long": "a" * 20000 + ".b.c",
    }
    assert {name: await status(gateway, token) for name, token in forged.items()} == dict.fromkeys(forged, 401)


async def test_an_expired_token_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    issuer = Issuer(tmp_path, USERS)
    issuer.start("--token-max-age", "1")
    try:
        gateway = Toy(f"{TENANTS}, security: {{oidc: [{{issuer: '{issuer.url}', audience: llmserve}}]}}")
        token = issuer.token("alice", "llmserve")
        await asyncio.sleep(2)
        # The clocks of others may be late by this much.
        assert await status(gateway, token) == 200
        monkeypatch.setattr(oidc, "_LEEWAY_S", 0.0)
        response = await gateway.post(CHAT, token)
    finally:
        issuer.end()
    assert response.status_code == 401
    assert "expired" in response.json()["error"]["message"]


async def test_a_rotated_key_is_found_at_its_first_token_and_the_old_one_ends(
    gateway: Toy, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = issuer.token("alice", "llmserve")
    assert await status(gateway, old) == 200
    await asyncio.to_thread(issuer.rotate)
    # Until the keys are read again the old ones are known.
    assert await status(gateway, old) == 200
    monkeypatch.setattr(oidc, "_RETRY_S", 0.0)
    assert await status(gateway, issuer.token("alice", "llmserve")) == 200
    assert await status(gateway, old) == 401


async def test_unknown_keys_do_not_make_the_gateway_ask_again_and_again(gateway: Toy, issuer: Issuer) -> None:
    assert await status(gateway, issuer.token("alice", "llmserve")) == 200
    keys = gateway.access.identity._tokens._providers[issuer.url][1]  # type: ignore[union-attr]
    fetched = keys._fetched_s
    for name in ("x", "y"):
        assert await keys.key(name, "") is None
    assert keys._fetched_s == fetched


async def test_an_issuer_that_is_away_locks_nobody_out_whose_key_is_known(
    gateway: Toy, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = issuer.token("alice", "llmserve")
    assert await status(gateway, token) == 200
    await asyncio.to_thread(issuer.end)
    try:
        monkeypatch.setattr(oidc, "_RETRY_S", 0.0)
        keys = gateway.access.identity._tokens._providers[issuer.url][1]  # type: ignore[union-attr]
        keys._clock_s = lambda: time.monotonic() + 2 * 3600
        assert await status(gateway, token) == 200
        keys._clock_s = lambda: time.monotonic() + 25 * 3600
        assert await status(gateway, token) == 503
        fresh = Toy(f"{TENANTS}, security: {{oidc: [{{issuer: '{issuer.url}', audience: llmserve}}]}}")
        assert await status(fresh, token) == 503
    finally:
        await asyncio.to_thread(issuer.start)
