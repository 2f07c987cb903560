"""What a manifest will start on a machine, as values: pure, so that it can be shown and tested without starting."""

from __future__ import annotations

from dataclasses import dataclass

from llmserve.manifests.ladder import Rung, plan_ladder
from llmserve.manifests.machine import Machine
from llmserve.manifests.models import ModelShape
from llmserve.manifests.plan_warnings import plan_warnings
from llmserve.manifests.roles import RolePlan, host_memory, plan_roles, weight_bytes
from llmserve.manifests.schema import Manifest
from llmserve.manifests.sizes import (
    GB,
    KB,
    BlockSize,
    Device,
    block_size,
    device,
    dram_bytes,
    engine_kv_space_bytes,
    engine_ranks,
    engine_transfer_gbps,
    max_model_len,
    page_shape,
    with_dtype,
)


@dataclass(frozen=True, slots=True)
class Budget:
    """One bound, and what it comes to for one engine if it is divided."""

    name: str
    value: str
    share: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that ``llmserve apply`` shows."""

    deployment: str
    model: str
    engine: str
    device: Device
    mode: str
    max_model_len: int | None
    block: BlockSize | None
    """None: unknown before the model is here."""
    pages: int | None
    """Of one engine."""
    roles: tuple[RolePlan, ...]
    memory_bytes: int | None
    """Of the host, in all; None if a part is unknown."""
    budgets: tuple[Budget, ...]
    tiers: tuple[str, ...]
    ladder: tuple[Rung, ...]
    warnings: tuple[str, ...]


def make_plan(
    manifest: Manifest, machine: Machine, primary: ModelShape | None = None, draft: ModelShape | None = None
) -> Plan:
    """The plan. ``primary`` and ``draft`` are the models' shapes, None for a model whose files are not here."""
    asked, manifest = manifest, with_dtype(manifest, machine)
    spec = manifest.spec
    on = device(manifest, machine)
    block = block_size(page_shape(manifest, primary), spec.kv_cache.page_size_kb, on) if primary else None
    kv_bytes = engine_kv_space_bytes(manifest, on)
    pages = None
    if block is not None and kv_bytes is not None:
        pages = int(kv_bytes / engine_ranks(manifest) // (block.actual_kb * KB))
    roles = plan_roles(manifest, on, weight_bytes(manifest, primary, draft), kv_bytes)
    memory = host_memory(manifest, on, roles)
    return Plan(
        deployment=manifest.metadata.name,
        model=_model_text(manifest, asked.spec.models.primary.dtype),
        engine=spec.engine.kind,
        device=on,
        mode=spec.deployment.mode,
        max_model_len=max_model_len(manifest, primary) if primary else spec.models.primary.max_model_len,
        block=block,
        pages=pages,
        roles=roles,
        memory_bytes=memory,
        budgets=_budgets(manifest, kv_bytes),
        tiers=_tiers(manifest, on),
        ladder=plan_ladder(manifest, machine),
        warnings=tuple(plan_warnings(manifest, machine, primary, block, pages, roles, memory)),
    )


def _model_text(manifest: Manifest, asked_dtype: str) -> str:
    models = manifest.spec.models
    dtype = models.primary.dtype
    parts = [models.primary.id, dtype if dtype == asked_dtype else f"{dtype} as this CPU has no fast bf16"]
    if models.primary.served_name and models.primary.served_name != models.primary.id:
        parts.append(f"served as {models.primary.served_name}")
    if engine_ranks(manifest) > 1:
        parts.append(f"TP {models.primary.tensor_parallel} x PP {models.primary.pipeline_parallel}")
    if models.draft is not None and models.draft.enabled:
        parts.append(f"draft {models.draft.id}, {models.draft.speculative_tokens} tokens ahead")
    return ", ".join(parts)


def _budgets(manifest: Manifest, kv_bytes: int | None) -> tuple[Budget, ...]:
    spec = manifest.spec
    hbm, gbps, share = spec.budgets.max_kv_hbm_gb, spec.budgets.max_kv_io_gbps, engine_transfer_gbps(manifest)
    # The share can be no bound if kv_space_gb is lower: show what an engine really gets.
    each = f"{kv_bytes / GB:.2f} GB for each engine" if hbm is not None and kv_bytes is not None else ""
    return (
        Budget("tokens in flight", _bound(spec.budgets.max_tokens_in_flight)),
        Budget("prefill concurrency", _bound(spec.budgets.max_prefill_concurrency)),
        Budget("decode concurrency", _bound(spec.budgets.max_decode_concurrency)),
        Budget("KV in HBM, GB", _bound(hbm), each),
        Budget("KV IO, Gbit/s", _bound(gbps), "" if share is None else f"{share:g} for each decode engine"),
        Budget("queued requests of a tenant", str(spec.scheduling.policies.queue_max_len)),
        *(
            Budget(f"tenant {name}", f"weight {tenant.weight:g}", f"at once: {_bound(tenant.max_concurrency)}")
            for name, tenant in sorted(spec.scheduling.fair_share.tenants.items())
        ),
    )


def _bound(value: float | None) -> str:
    return "no bound" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _tiers(manifest: Manifest, on: Device) -> tuple[str, ...]:
    spec = manifest.spec
    memory = "memory of the engines" if on == "cpu" else "HBM of the engines"
    reuse = "prefixes are reused" if spec.kv_cache.prefix_caching else "prefixes are not reused"
    lines = [f"{memory}, {spec.kv_cache.hbm_dtype}, {reuse}"]
    if (size := dram_bytes(manifest)) is not None:
        lines.append(f"DRAM: {size / GB:g} GB for each engine")
    sealed = "" if spec.kv_cache.encryption is None else ", AES-256-GCM"
    for storage in spec.storageClasses:
        place = storage.path or f"bucket {storage.bucket}" + (
            f" at {storage.endpoint_url}" if storage.endpoint_url else ""
        )
        bound = "no bound" if storage.capacity_gb is None else f"{storage.capacity_gb:g} GB"
        lines.append(f"{storage.name}: {storage.type}, {place}, {spec.kv_cache.disk_dtype or 'raw'}{sealed}, {bound}")
    return tuple(lines)
