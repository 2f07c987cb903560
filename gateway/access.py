"""Who may come in, and how much of it: what a reload exchanges while requests are served."""

from __future__ import annotations

import time
from dataclasses import dataclass
from http import HTTPStatus

from llmserve.gateway.caller import Failure
from llmserve.gateway.identity import Identity, api_keys
from llmserve.gateway.limits import LimitExceeded, TenantLimiter, TenantLimits
from llmserve.gateway.metrics import GatewayMetrics
from llmserve.gateway.oidc import OidcTokens
from llmserve.manifests.schema import Manifest, PrimaryModel

_FREE = frozenset({"/tokenize", "/detokenize", "/v1/messages/count_tokens"})
_FILES, _BATCHES = "/v1/files", "/v1/batches"


@dataclass(slots=True)
class Access:
    """The parts are read at each request and may be exchanged between two."""

    identity: Identity
    metrics: GatewayMetrics
    limits: TenantLimits
    model: str
    """The name that clients use."""

    @classmethod
    def of(cls, manifest: Manifest, metrics: GatewayMetrics) -> Access:
        """Raises ``ManifestError``."""
        limits = TenantLimits(manifest.spec.scheduling.fair_share.tenants, time.monotonic())
        return cls(_identity(manifest, metrics), metrics, limits, served_name(manifest.spec.models.primary))

    def change(self, manifest: Manifest) -> None:
        """Let in whom ``manifest`` lets in; what was spent stays spent. Raises ``ManifestError``, then nothing
        has changed."""
        self.identity = _identity(manifest, self.metrics)
        self.limits.change(manifest.spec.scheduling.fair_share.tenants, time.monotonic())

    def may_use_model(self, limiter: TenantLimiter | None) -> bool:
        return limiter is None or not limiter.limits.models or self.model in limiter.limits.models

    def enter(self, limiter: TenantLimiter | None, method: str, path: str) -> bool:
        """Whether the request counts, and ``leave`` must follow. Raises ``LimitExceeded``."""
        if limiter is None or method != "POST" or path in _FREE or is_storage(path):
            return False
        if not self.may_use_model(limiter):
            raise LimitExceeded(no_such_model(self.model))
        limiter.enter(time.monotonic())
        return True


def _identity(manifest: Manifest, metrics: GatewayMetrics) -> Identity:
    keys, providers = api_keys(manifest), manifest.spec.security.oidc
    if not providers:
        return Identity(keys)
    tenants = manifest.spec.scheduling.fair_share.tenants
    return Identity(keys, OidcTokens(providers, tenants.__contains__, metrics))


def served_name(model: PrimaryModel) -> str:
    """The name that clients use."""
    return model.served_name or model.id


def is_storage(path: str) -> bool:
    """Whether a path is about files and batches rather than tokens."""
    return path.startswith((_FILES, _BATCHES))


def is_upload(path: str) -> bool:
    """Whether the body of a request to this path is a file."""
    return path.rstrip("/") == _FILES


def no_such_model(model: str) -> Failure:
    return Failure(HTTPStatus.NOT_FOUND, "NotFoundError", f"The model `{model}` does not exist.")
