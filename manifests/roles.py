"""The roles of a deployment on a machine: how many replicas, in which processes, with how much memory."""

from __future__ import annotations

from dataclasses import dataclass

from llmserve.manifests.models import ModelShape
from llmserve.manifests.schema import Manifest
from llmserve.manifests.sizes import Device, decode_engines, dram_bytes, engine_ranks, prefill_engines

_PYTHON_BYTES = 600 * 2**20
"""Of a process that has imported vLLM and torch: 2.1 GB for two engines with 1 GB of KV and 0.5 GB of weights."""
_SIMULATED_BYTES = 50 * 2**20
_WEIGHT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True, slots=True)
class RolePlan:
    """All replicas of one role."""

    role: str
    replicas: int
    runs_in: str
    processes: int
    """Beyond the one of ``llmserve up``, over all replicas."""
    gpus: int = 0
    """Of one replica."""
    weight_bytes: int | None = 0
    """Of one replica, the draft model included; None: unknown before the model is here."""
    kv_bytes: int | None = 0
    """Of one replica over all its ranks; None: vLLM measures what is free."""


def weight_bytes(manifest: Manifest, primary: ModelShape | None, draft: ModelShape | None) -> int | None:
    """Of one engine, a prefill engine as well: it loads the draft model too, whose pages are handed over."""
    models = manifest.spec.models
    if manifest.spec.engine.kind == "simulated":
        return 0

    def as_loaded(shape: ModelShape | None) -> int | None:
        if shape is None or not shape.weight_bytes:
            return None
        return shape.weight_bytes * _WEIGHT_BYTES.get(models.primary.dtype, shape.dtype_bytes) // shape.dtype_bytes

    alone = as_loaded(primary)
    if models.draft is None or not models.draft.enabled:
        return alone
    extra = as_loaded(draft)
    return None if alone is None or extra is None else alone + extra


def plan_roles(
    manifest: Manifest, on: Device, weight_bytes: int | None, kv_bytes: int | None
) -> tuple[RolePlan, ...]:
    spec, simulated = manifest.spec, manifest.spec.engine.kind == "simulated"
    local = spec.deployment.mode == "local"
    host = "llmserve up" if local else "its own pod"
    one = 0 if local else 1
    ranks = engine_ranks(manifest)
    # A worker's own process steps an engine of one CPU rank in a thread; any other needs processes.
    threaded = not local and on == "cpu" and ranks == 1
    own = 0 if simulated or threaded else ranks + (ranks > 1)
    engine_in = f"{host}, engine in {own} more" if own else host
    resources = spec.deployment.resources

    def engines(role: str, replicas: int, gpus: int) -> RolePlan:
        taken = 0 if on == "cpu" else max(gpus, ranks)
        held = 0 if simulated else kv_bytes
        return RolePlan(role, replicas, engine_in, (one + own) * replicas, taken, weight_bytes, held)

    external = spec.bus.url is not None
    embedded_in = "child of llmserve up" if local else host
    nats = RolePlan("nats", 1, "external" if external else embedded_in, 0 if external else 1)
    fixed: tuple[RolePlan, ...] = (nats, RolePlan("gateway", 1, host, one), RolePlan("router", 1, host, one))
    if spec.storageClasses:
        # One for each node; Kubernetes has more than this plan knows.
        fixed = (*fixed, RolePlan("kv", 1, host, one))
    decode = decode_engines(manifest)
    if not prefill_engines(manifest):
        return (*fixed, engines("both", decode, resources.decode_gpu))
    return (
        *fixed,
        engines("prefill", prefill_engines(manifest), resources.prefill_gpu),
        engines("decode", decode, resources.decode_gpu),
    )


def host_memory(manifest: Manifest, on: Device, roles: tuple[RolePlan, ...]) -> int | None:
    """Bytes of main memory: weights and KV count on CPUs only."""
    processes = sum(role.processes for role in roles if role.role != "nats")
    total = _PYTHON_BYTES * (1 + processes) if manifest.spec.deployment.mode == "local" else _PYTHON_BYTES * processes
    if manifest.spec.engine.kind == "simulated":
        return total + _SIMULATED_BYTES * sum(role.replicas for role in roles)
    total += (dram_bytes(manifest) or 0) * (prefill_engines(manifest) + decode_engines(manifest))
    if on == "cuda":
        return total
    for role in roles:
        if role.weight_bytes is None or role.kv_bytes is None:
            return None
        total += role.replicas * (role.weight_bytes + role.kv_bytes)
    return total
