"""What the two halves of the connector tell each other, and the engine's front, each step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats

from llmserve.workers.connector.wire import Handoff


@dataclass(frozen=True, slots=True)
class RankMeta(KVConnectorHandshakeMetadata):  # type: ignore[misc]  # vLLM is untyped
    """A worker to the scheduler, once at start."""

    fingerprint: str
    pages: bytes
    """Encoded ``RankPages``."""


@dataclass(frozen=True, slots=True)
class Pull:
    """Pages to be read for one request."""

    handoff: Handoff
    local: list[list[int]]
    """Own page numbers by group."""
    remote: list[list[int]]
    arrived_s: float
    """Monotonic time at which the request came; its lease is at least that old."""
    refusal: str = ""
    """Why it cannot be read: to be reported as failed."""
    at_once: bool = False
    """The step that orders it computes with these pages: the device waits for them, and the step's output says
    whether they were valid."""


@dataclass(slots=True)
class StepMeta(KVConnectorMetadata):  # type: ignore[misc]  # vLLM is untyped
    """Scheduler to workers, each step."""

    disarm: list[int] = field(default_factory=list)
    """Slots to be zeroed before this step writes to pages; before ``arm``, which may reuse them."""
    arm: list[tuple[int, int]] = field(default_factory=list)
    """(slot, token): written before the step's outputs, one of which may publish the token, leave the worker."""
    hold: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Request -> (slot, lease in seconds)."""
    release: list[str] = field(default_factory=list)
    pull: dict[str, Pull] = field(default_factory=dict)
    dismiss: list[Handoff] = field(default_factory=list)
    """Handoffs that are not read: the producer is told so."""
    failures: list[str] = field(default_factory=list)
    """Kinds of failure of handoffs that were declined without a pull."""
    computed: dict[str, int] = field(default_factory=dict)
    """Request -> tokens of its prompt that are computed after this step, for prompts that go on."""
    idle: bool = False
    """Nothing is computed in this step."""


@dataclass(slots=True)
class Said(KVConnectorWorkerMetadata):  # type: ignore[misc]  # vLLM is untyped
    """The workers to the scheduler, with a step's output."""

    computed: dict[str, int] = field(default_factory=dict)
    """``StepMeta.computed``, which has come true."""
    loaded: dict[str, bool] = field(default_factory=dict)
    """Requests whose pages were loaded at once -> whether they were valid, on all ranks."""
    near: set[tuple[str, str]] = field(default_factory=set)
    """(engine id of a producer, rank) that turned out to be on this host: the next pages may be loaded at once."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        assert isinstance(other, Said)
        # All ranks were told to compute and to load the same.
        loaded = {request: fine and other.loaded.get(request, False) for request, fine in self.loaded.items()}
        return Said(self.computed, loaded, self.near | other.near)


_KINDS = ("transfers", "released", "ahead", "spoilt")


class TransferStats(KVConnectorStats):  # type: ignore[misc]  # vLLM is untyped
    """Finished transfers ``[engine, direction, bytes, seconds, failure, request]``, requests freed, ``[request,
    encoded handoff]`` of prompts that are computed in part, and requests whose tokens were computed with pages that
    were not valid."""

    def __init__(self, data: dict[str, Any] | None = None) -> None:
        super().__init__(data if data else {})
        self.data: dict[str, list[Any]]
        for kind in _KINDS:
            self.data.setdefault(kind, [])

    def reset(self) -> None:
        self.data = {kind: [] for kind in _KINDS}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        return TransferStats({key: [*self.data[key], *other.data.get(key, [])] for key in self.data})

    def reduce(self) -> dict[str, int | float]:
        moved = [t for t in self.data["transfers"] if not t[4]]
        return {
            "transfers": len(moved),
            "failed transfers": len(self.data["transfers"]) - len(moved),
            "MB": sum(t[2] for t in moved) / 1e6,
        }

    def is_empty(self) -> bool:
        return not any(self.data.values())
