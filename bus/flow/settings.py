"""What the router is told: shares, budgets and deadlines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from llmserve.manifests.schema import Manifest


@dataclass(frozen=True, slots=True)
class TenantSettings:
    """One tenant's share and bound."""

    weight: float = 1.0
    ttft_slo_s: float | None = None
    """Time to first token to aim at."""
    max_concurrency: int | None = None
    """Requests in progress at once, in all stages together."""


_UNNAMED = TenantSettings()


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
    max_kv_hbm_bytes: int | None = None
    """KV pages in use on all workers together."""
    max_kv_io_bytes_per_s: float | None = None
    """Page bytes that handoffs and loads of prefixes move, on average. Handoffs wait for it, loads draw on it."""
    min_decode_slots: int = 0
    """Slots of each decode worker, or worker of both roles, that batch work never gets."""
    batch_share: float = 0.05
    """Part of the service that batch work is guaranteed while interactive work waits too."""
    max_wait_s: float = 30.0
    """How long a request may wait inside its tenant's share while shorter ones overtake it."""
    reject_after_s: float | None = None
    """An interactive request that has not begun for so long is rejected: ``overdue``."""
    aging_tokens_per_s: float = 100.0
    """Cost that a second of waiting outweighs inside a tenant."""
    slo_lead_tokens: float = 8192.0
    """Cost by which a tenant that would miss its ``ttft_slo_s`` may be ahead of its share."""
    output_weight: float = 2.0
    """Cost of an output token in prompt tokens."""
    kv_tokens_per_gb: float = 0.0
    """Cost, in prompt tokens, of 2**30 bytes of pages that handoffs move."""
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
    gateway_absence_s: float = 0.5
    """As for workers; longer, since its clients could not be answered when it returns."""
    inventory_grace_s: float = 0.6
    """A grant younger than this may be missing in a heartbeat that crossed it on the way."""
    lost_retry_s: float = 2.0
    """Between two notices to a gateway of the same lost attempt, or of the same rejection."""
    lease_margin_s: float = 2.0
    """What must be left of a handoff's lease when it is granted; half the lease if that is less."""
    queue_deadline_s: float = 600.0
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

    def usable_s(self, lease_s: float) -> float:
        """Of a handoff's lease, the time in which it may be granted."""
        return lease_s - min(self.lease_margin_s, lease_s / 2)

    def tenant(self, name: str) -> TenantSettings:
        return self.tenants.get(name, _UNNAMED)

    @classmethod
    def from_manifest(cls, manifest: Manifest) -> RouterSettings:
        """The router's part of a manifest."""
        spec, budgets, policies = manifest.spec, manifest.spec.budgets, manifest.spec.scheduling.policies
        return cls(
            tenants={
                name: TenantSettings(
                    weight=tenant.weight,
                    ttft_slo_s=None if tenant.ttft_slo_ms is None else tenant.ttft_slo_ms / 1000,
                    max_concurrency=tenant.max_concurrency,
                )
                for name, tenant in spec.scheduling.fair_share.tenants.items()
            },
            kv_tokens_per_gb=spec.scheduling.fair_share.kv_tokens_per_gb,
            max_tokens_in_flight=budgets.max_tokens_in_flight,
            max_prefill_concurrency=budgets.max_prefill_concurrency,
            max_decode_concurrency=budgets.max_decode_concurrency,
            max_kv_hbm_bytes=None if budgets.max_kv_hbm_gb is None else int(budgets.max_kv_hbm_gb * 2**30),
            max_kv_io_bytes_per_s=None if budgets.max_kv_io_gbps is None else budgets.max_kv_io_gbps * 1e9 / 8,
            min_decode_slots=policies.min_decode_slots,
            batch_share=policies.batch_share,
            max_wait_s=policies.max_wait_s,
            reject_after_s=policies.reject_after_s,
            aging_tokens_per_s=policies.aging_tokens_per_s,
            # When a server of a cluster dies, its clients are nowhere until they have found another.
            worker_absence_s=0.2 if spec.bus.replicas == 1 else 2.0,
            gateway_absence_s=0.5 if spec.bus.replicas == 1 else 2.0,
        )
