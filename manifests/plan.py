"""What a manifest will start on a machine, as values: pure, so that it can be shown and tested without starting."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llmserve.manifests.machine import Machine
from llmserve.manifests.models import ModelShape
from llmserve.manifests.schema import Manifest, Spec
from llmserve.manifests.sizes import (
    GB,
    KB,
    BlockSize,
    Device,
    block_size,
    decode_engines,
    device,
    dram_bytes,
    engine_kv_space_bytes,
    engine_ranks,
    engine_transfer_gbps,
    max_model_len,
    page_shape,
    prefill_engines,
)

_PYTHON_BYTES = 600 * 2**20
"""Of a process that has imported vLLM and torch: 2.1 GB for two engines with 1 GB of KV and 0.5 GB of weights."""
NO_PIPELINE_ON_CPUS = "needs GPUs: on CPUs vLLM 0.32's engine ends at its first step"
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


@dataclass(frozen=True, slots=True)
class Rung:
    """One transfer engine of the ladder."""

    engine: str
    available: bool
    note: str


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
    spec = manifest.spec
    on = device(manifest, machine)
    block = block_size(page_shape(manifest, primary), spec.kv_cache.page_size_kb, on) if primary else None
    kv_bytes = engine_kv_space_bytes(manifest, on)
    pages = None
    if block is not None and kv_bytes is not None:
        pages = int(kv_bytes / engine_ranks(manifest) // (block.actual_kb * KB))
    roles = _roles(manifest, on, _weight_bytes(manifest, primary, draft), kv_bytes)
    memory = _host_memory(manifest, on, roles)
    return Plan(
        deployment=manifest.metadata.name,
        model=_model_text(manifest),
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
        ladder=_ladder(manifest, machine),
        warnings=tuple(_warnings(manifest, machine, primary, block, pages, roles, memory)),
    )


def _model_text(manifest: Manifest) -> str:
    models = manifest.spec.models
    parts = [models.primary.id, models.primary.dtype]
    if models.primary.served_name and models.primary.served_name != models.primary.id:
        parts.append(f"served as {models.primary.served_name}")
    if engine_ranks(manifest) > 1:
        parts.append(f"TP {models.primary.tensor_parallel} x PP {models.primary.pipeline_parallel}")
    if models.draft is not None and models.draft.enabled:
        parts.append(f"draft {models.draft.id}, {models.draft.speculative_tokens} tokens ahead")
    return ", ".join(parts)


def _weight_bytes(manifest: Manifest, primary: ModelShape | None, draft: ModelShape | None) -> int | None:
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


def _roles(manifest: Manifest, on: Device, weight_bytes: int | None, kv_bytes: int | None) -> tuple[RolePlan, ...]:
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


def _host_memory(manifest: Manifest, on: Device, roles: tuple[RolePlan, ...]) -> int | None:
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


def _ladder(manifest: Manifest, machine: Machine) -> tuple[Rung, ...]:
    spec = manifest.spec
    if not prefill_engines(manifest):
        return (Rung("none", True, "one engine prefills and decodes: no pages move"),)
    if spec.engine.kind == "simulated":
        simulated = spec.engine.simulated
        rate = f"{simulated.transfer_gbps:g} Gbit/s" if simulated is not None else "the default rate"
        return (Rung("simulated", True, f"takes the time that {rate} would"),)
    same_host = (Rung("same_host", True, "first where both ends are on one host"),) if spec.transfer.same_host else ()
    return (*same_host, *(_rung(name, spec, machine) for name in spec.transfer.engine_order))


def _rung(name: str, spec: Spec, machine: Machine) -> Rung:
    library = {"nixl": "nixl", "ucx": "ucxx", "nccl": "torch"}[name]
    version = machine.libraries.get(library)
    if version is None:
        return Rung(name, False, f"the package {library} is not installed")
    return Rung(name, True, f"{library} {version}{_rung_note(name, spec, machine)}")


def _rung_note(name: str, spec: Spec, machine: Machine) -> str:
    transfer = spec.transfer
    if name == "nixl":
        return "" if transfer.nixl.backend_policy == "auto" else f", backend {transfer.nixl.backend_policy} only"
    if name == "ucx":
        forbidden = transfer.ucx is not None and not transfer.ucx.rdma
        return (
            ", RDMA forbidden" if forbidden else "" if machine.rdma else ", no RDMA device here: TCP, shared memory"
        )
    if not machine.gpus:
        return ", gloo: no GPU here"
    return ", without copies between GPUs" if transfer.nccl is not None and not transfer.nccl.p2p else ""


def _warnings(
    manifest: Manifest,
    machine: Machine,
    primary: ModelShape | None,
    block: BlockSize | None,
    pages: int | None,
    roles: tuple[RolePlan, ...],
    memory: int | None,
) -> Iterator[str]:
    local = manifest.spec.deployment.mode == "local"
    if machine.gpu_note:
        yield machine.gpu_note
    length = manifest.spec.models.primary.max_model_len
    if primary is None:
        yield "the model is not on this machine yet: sizes that depend on it are unknown"
    elif length is not None and length > primary.max_position_embeddings:
        yield f"max_model_len {length} is more than the model was made for, {primary.max_position_embeddings} tokens"
    if primary is not None and block is not None and pages is not None:
        needed = -(-max_model_len(manifest, primary) // block.tokens)
        if pages < needed:
            yield f"KV space of {pages} pages for each engine; one request of the full length needs {needed}"
    if local and memory is not None and memory > machine.memory_bytes:
        yield f"{memory / GB:.1f} GB of memory needed, {machine.memory_bytes / GB:.1f} GB here"
    for storage in manifest.spec.storageClasses:
        if storage.gds:
            yield (
                f"{storage.name}: gds: pages are stored encoded, so GPUs cannot read them themselves; they are read "
                "past the page cache (O_DIRECT) where the filesystem can"
            )
    if local:
        yield from _device_warnings(manifest, machine, roles)


def _device_warnings(manifest: Manifest, machine: Machine, roles: tuple[RolePlan, ...]) -> Iterator[str]:
    spec = manifest.spec
    if spec.engine.kind == "simulated":
        return
    resources, ranks = spec.deployment.resources, engine_ranks(manifest)
    wish = sum(
        replicas * max(gpus, ranks)
        for replicas, gpus in (
            (prefill_engines(manifest), resources.prefill_gpu),
            (decode_engines(manifest), resources.decode_gpu),
        )
        if gpus
    )
    stages = spec.models.primary.pipeline_parallel
    if stages > 1 and not (wish and machine.gpus):
        yield f"pipeline_parallel {stages} {NO_PIPELINE_ON_CPUS}; no worker will start"
    if wish > len(machine.gpus):
        rest = "" if machine.gpus else ": the engines run on the CPU"
        yield f"fewer GPUs than asked for: {wish} asked for, {len(machine.gpus)} here{rest}"
    for role in roles:
        if role.gpus > ranks:
            yield f"{role.role}: {role.gpus} GPUs for each replica, tensor_parallel x pipeline_parallel uses {ranks}"
        known = (role.weight_bytes or 0) + (role.kv_bytes or 0)
        if machine.gpus and role.gpus and known / ranks > min(gpu.memory_bytes for gpu in machine.gpus):
            yield f"{role.role}: {known / ranks / GB:.1f} GB on each GPU needed, more than one has here"
    engines = sum(role.replicas for role in roles if role.role in ("prefill", "decode", "both"))
    if not wish and engines * ranks > machine.cores:
        yield f"{engines * ranks} engine threads share {machine.cores} cores"
