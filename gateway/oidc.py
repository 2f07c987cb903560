"""Web tokens of OpenID Connect issuers: discovery, their keys, and what a token must say.

PyJWT checks signatures and claims; here is when to ask the issuer: at the first token, when its keys are old, and
when a token names a key that is not known, but not more often than each ``_RETRY_S``. An issuer that is away does not
lock callers out: its last keys stay good until ``_STALE_MAX_S``.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import TypeVar

import httpx
import jwt
import msgspec

from llmserve.gateway.identity import Denied
from llmserve.gateway.metrics import GatewayMetrics
from llmserve.manifests.schema import Oidc

log = logging.getLogger(__name__)

T = TypeVar("T")

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
"""Those with a public key: a secret shared with the issuer has no place in a gateway."""
_RETRY_S = 5.0
_STALE_MAX_S = 24 * 3600.0
_LEEWAY_S = 30.0
_TIMEOUT_S = 5.0
_MAX_BYTES = 1 << 20
_TOKEN_MAX_BYTES = 16 << 10


class IssuerError(Exception):
    """The issuer cannot be asked, or answers wrongly."""


class _Configuration(msgspec.Struct):
    """The part of the discovery document that is used."""

    issuer: str
    jwks_uri: str


class _KeySet(msgspec.Struct):
    keys: list[dict[str, object]]


class IssuerKeys:
    """The public keys of one issuer by key id. Times are monotonic seconds."""

    def __init__(self, provider: Oidc, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._provider = provider
        self._clock_s = clock_s
        self._keys: dict[str | None, jwt.PyJWK] = {}
        self._fetched_s = float("-inf")
        self._tried_s = float("-inf")
        self._lock = asyncio.Lock()

    async def key(self, key_id: str | None, token: str) -> jwt.PyJWK | None:
        """The key that ``token`` was signed with, None if the issuer has none. Raises ``IssuerError``.

        A token without a key id is good with any key of the issuer (OpenID Connect Core, 10.1: then there is one).
        """
        now = self._clock_s()
        if self._find(key_id, token) is None or now - self._fetched_s > self._provider.keys_max_age_s:
            await self._refresh(now)
        if now - self._fetched_s > max(_STALE_MAX_S, self._provider.keys_max_age_s):
            raise IssuerError(f"issuer {self._provider.issuer} cannot be reached")
        return self._find(key_id, token)

    def _find(self, key_id: str | None, token: str) -> jwt.PyJWK | None:
        if key_id is not None:
            return self._keys.get(key_id)
        return next((key for key in self._keys.values() if _signed(token, key)), None)

    async def _refresh(self, now: float) -> None:
        async with self._lock:
            # Whoever waited for another's answer takes it; and strangers with made-up key ids do not make us ask on.
            if self._tried_s >= now or now - self._tried_s < _RETRY_S:
                return
            self._tried_s = self._clock_s()
            try:
                self._keys = await self._fetch()
                self._fetched_s = self._clock_s()
            except IssuerError as error:
                log.warning("keys of issuer %s are not read: %s", self._provider.issuer, error)

    async def _fetch(self) -> dict[str | None, jwt.PyJWK]:
        issuer = self._provider.issuer
        async with httpx.AsyncClient(timeout=_TIMEOUT_S, follow_redirects=False) as client:
            url = f"{issuer.rstrip('/')}/.well-known/openid-configuration"
            configuration = await _get(client, url, _Configuration)
            if configuration.issuer != issuer:
                raise IssuerError(f"its configuration names another issuer, {configuration.issuer}")
            found = await _get(client, configuration.jwks_uri, _KeySet)
        keys: dict[str | None, jwt.PyJWK] = {}
        for entry in found.keys:
            if entry.get("use", "sig") != "sig":
                continue
            try:
                key = jwt.PyJWK(entry)
            except jwt.PyJWTError as error:
                log.info("a key of issuer %s is of no use: %s", issuer, error)
                continue
            if key.key_type in ("RSA", "EC", "OKP"):
                keys[key.key_id] = key
        log.info("issuer %s has %d keys", issuer, len(keys))
        return keys


class OidcTokens:
    """Verifies tokens of the manifest's issuers."""

    def __init__(self, providers: Sequence[Oidc], tenants: Callable[[str], bool], metrics: GatewayMetrics) -> None:
        """``tenants`` says whether a name is one of a tenant."""
        self._providers = {provider.issuer: (provider, IssuerKeys(provider)) for provider in providers}
        self._tenants = tenants
        self._metrics = metrics

    async def tenant_of(self, token: str) -> str:
        """The tenant that the token names. Raises ``Denied``."""
        try:
            tenant = await self._verified(token)
        except jwt.PyJWTError as error:
            self._metrics.tokens.labels("refused").inc()
            raise Denied(HTTPStatus.UNAUTHORIZED, f"The token is not accepted: {error}") from error
        except IssuerError as error:
            self._metrics.tokens.labels("issuer_away").inc()
            raise Denied(HTTPStatus.SERVICE_UNAVAILABLE, f"The token cannot be checked: {error}") from error
        if not self._tenants(tenant):
            self._metrics.tokens.labels("no_tenant").inc()
            raise Denied(HTTPStatus.FORBIDDEN, "The token names no tenant of this deployment")
        self._metrics.tokens.labels("accepted").inc()
        return tenant

    async def _verified(self, token: str) -> str:
        if len(token) > _TOKEN_MAX_BYTES:
            raise jwt.InvalidTokenError(f"it is longer than {_TOKEN_MAX_BYTES} bytes")
        header = jwt.get_unverified_header(token)
        if header.get("alg") not in ALGORITHMS:
            raise jwt.InvalidAlgorithmError("its algorithm is not one with a public key")
        # Only to find the issuer; everything is checked below.
        claimed = jwt.decode(token, options={"verify_signature": False})
        found = self._providers.get(str(claimed.get("iss")))
        if found is None:
            raise jwt.InvalidIssuerError("its issuer is not known here")
        provider, keys = found
        key = await keys.key(header.get("kid"), token)
        if key is None:
            raise jwt.InvalidKeyError("its issuer has no such key")
        claims: Mapping[str, object] = jwt.decode(
            token,
            key.key,
            algorithms=[name for name in ALGORITHMS if _fits(name, key)],
            issuer=provider.issuer,
            audience=provider.audience,
            leeway=_LEEWAY_S,
            options={"require": ["exp", "iss", "aud"]},
        )
        tenant = claims.get(provider.tenant_claim)
        return tenant if isinstance(tenant, str) else ""


def _signed(token: str, key: jwt.PyJWK) -> bool:
    try:
        jwt.PyJWS().decode(token, key.key, algorithms=[name for name in ALGORITHMS if _fits(name, key)])
    except jwt.PyJWTError:
        return False
    return True


def _fits(algorithm: str, key: jwt.PyJWK) -> bool:
    """Whether a key may be used so: by its type, and by the algorithm that it is bound to, if any."""
    bound = key._jwk_data.get("alg")
    if bound is not None and bound != algorithm:
        return False
    kinds = {"RS": "RSA", "PS": "RSA", "ES": "EC", "Ed": "OKP"}
    return kinds[algorithm[:2]] == key.key_type


async def _get(client: httpx.AsyncClient, url: str, kind: type[T]) -> T:
    try:
        async with client.stream("GET", url) as response:
            if response.status_code != 200:
                raise IssuerError(f"{url} answers {response.status_code}")
            data = bytearray()
            async for chunk in response.aiter_bytes():
                data += chunk
                if len(data) > _MAX_BYTES:
                    raise IssuerError(f"{url} answers more than {_MAX_BYTES} bytes")
    except httpx.HTTPError as error:
        raise IssuerError(f"{url}: {str(error) or type(error).__name__}") from error
    try:
        return msgspec.json.decode(bytes(data), type=kind)
    except msgspec.MsgspecError as error:
        raise IssuerError(f"{url} answers no such document: {error}") from error
