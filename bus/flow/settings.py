"""What the router is told: shares, budgets and deadlines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from llmserve.manifests.schema import Manifest


@dataclass(frozen=True, slots=True)
class TenantSettings:
    """One tenant's share and bound."""

    weight: float = 1.0
    max_concurrency: int | None = None
    """Requests in progress at once, in all stages together."""


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """Settings of one deployment's router. None is no bound."""

    tenants: Mapping[str, TenantSettings] = field(default_factory=dict)
    """A tenant that is not named here has weight 1 and no bound."""
    max_tokens_in_flight: int | None = None
    """Prompt and ``max_tokens`` of all requests in progress."""
    max_prefill_concurrency: int | None = None
    max_decode_concurrency: int | None = None
    """Requests on decode workers; a request that runs whole on one worker counts here."""
    output_weight: float = 2.0
    """Cost of an output token in prompt tokens."""
    first_expected_output_tokens: float = 256.0
    """Expected output of a tenant of which nothing is known."""
    reserved_output_tokens: int = 512
    """Of a request's ``max_tokens``, what is set aside in pages of its worker. Most requests end long before
    ``max_tokens``; those that do not grow into what the heartbeats then report as used."""
    confirm_timeout_s: float = 3.0
    """A grant that is not confirmed for so long is lost."""
    member_timeout_s: float = 3.0
    """A member that is silent for so long is gone."""
    worker_absence_s: float = 0.2
    """A worker is gone when nobody has listened at its subject for so long."""
    gateway_absence_s: float = 0.8
    """As for workers; longer, since its clients could not be answered when it returns."""
    inventory_grace_s: float = 0.6
    """A grant younger than this may be missing in a heartbeat that crossed it on the way."""
    lost_retry_s: float = 2.0
    """Between two notices to a gateway of the same lost attempt, or of the same rejection."""
    lease_margin_s: float = 2.0
    """What must be left of a handoff's lease when it is granted; half the lease if that is less."""
    max_wait_s: float = 600.0
    """A request queued for longer is rejected."""
    retry_patience_s: float = 5.0
    """A later attempt, or a handoff, that no live worker could take for so long is rejected: its client has seen the
    request begin. With the time that a dead worker's silence takes to be noticed this stays below 10 s."""
    bypass_s: float = 1.0
    """How long smaller requests may overtake one that does not fit; then its stage is kept free for it."""
    sync_wait_s: float = 1.0
    """How long a new leader waits for inventories before it grants."""
    memory_s: float = 60.0
    """How long ended and cancelled requests are remembered."""
    index_blocks: int = 500_000
    """Pages whose whereabouts the router knows: about 250 bytes each."""
    inline_bytes: int = 256 * 1024
    """A larger encoded request is granted by its sequence alone."""

    def tenant(self, name: str) -> TenantSettings:
        return self.tenants.get(name) or TenantSettings()

    @classmethod
    def from_manifest(cls, manifest: Manifest) -> RouterSettings:
        """The router's part of a manifest."""
        spec = manifest.spec
        return cls(
            tenants={
                name: TenantSettings(weight=tenant.weight, max_concurrency=tenant.max_concurrency)
                for name, tenant in spec.scheduling.fair_share.tenants.items()
            },
            max_tokens_in_flight=spec.budgets.max_tokens_in_flight,
            max_prefill_concurrency=spec.budgets.max_prefill_concurrency,
            max_decode_concurrency=spec.budgets.max_decode_concurrency,
            # When a server of a cluster dies, its clients are nowhere until they have found another.
            worker_absence_s=0.2 if spec.bus.replicas == 1 else 2.0,
            gateway_absence_s=0.8 if spec.bus.replicas == 1 else 2.0,
        )
