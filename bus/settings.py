"""How one member uses the bus, and how the deployment's streams are kept."""

from __future__ import annotations

from dataclasses import dataclass

from llmserve.manifests.schema import BusTls, Manifest


@dataclass(frozen=True, slots=True)
class BusSettings:
    """Settings of a connection. The stream settings must be the same for all members of a deployment."""

    queue_max_len: int = 2000
    """Requests of one tenant and class on the stream, queued and running; one more raises ``QueueFull``."""
    request_max_age_s: float = 3600.0
    result_max_age_s: float = 900.0
    duplicate_window_s: float = 120.0
    """A request accepted twice within this time is stored once."""
    replicas: int = 1
    """Of every stream; 3 on a cluster that must outlive a host."""
    publish_patience_s: float = 10.0
    """How long operations on streams wait for a server that is away."""
    try_timeout_s: float = 1.0
    """Time for one try of an operation on a stream."""
    reconnect_wait_s: tuple[float, float] = (0.05, 0.2)
    """Bounds of the pause between attempts to reconnect; each connection draws its own."""
    outbox_max_bytes: int = 64 << 20
    """Publishes kept while the server is away; the oldest are dropped beyond it."""
    tls: BusTls | None = None

    @classmethod
    def from_manifest(cls, manifest: Manifest) -> BusSettings:
        """The bus's part of a manifest."""
        queue_max_len = manifest.spec.scheduling.policies.queue_max_len
        replicas = manifest.spec.bus.replicas
        if replicas == 1:
            return cls(queue_max_len=queue_max_len, tls=manifest.spec.bus.tls)
        # When a cluster loses its leader, the election alone takes 4 to 9 s.
        return cls(queue_max_len=queue_max_len, replicas=replicas, publish_patience_s=30.0, tls=manifest.spec.bus.tls)


@dataclass(slots=True)
class BusCounters:
    """What went wrong on one connection since it was opened."""

    reconnects: int = 0
    dropped_publishes: int = 0
    malformed: int = 0
    handler_errors: int = 0
