"""What a manifest asks for and this machine does not have."""

from __future__ import annotations

from collections.abc import Iterator

from llmserve.manifests.machine import Machine
from llmserve.manifests.models import ModelShape
from llmserve.manifests.roles import RolePlan
from llmserve.manifests.schema import Manifest
from llmserve.manifests.sizes import (
    GB,
    BlockSize,
    decode_engines,
    device,
    engine_ranks,
    max_model_len,
    prefill_engines,
)

NO_FP8 = "needs AVX-512 on CPUs, which this one does not have: allowed are auto, bf16, fp16"
NO_PIPELINE_ON_CPUS = "needs GPUs: on CPUs vLLM 0.32's engine ends at its first step"


def plan_warnings(
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
    if spec.models.primary.dtype in ("bf16", "fp16") and device(manifest, machine) == "cpu" and not machine.avx512:
        yield (
            f"models.primary.dtype: {spec.models.primary.dtype}: this CPU is several times faster in fp32, which "
            "auto would take"
        )
    resources, ranks = spec.deployment.resources, engine_ranks(manifest)
    wish = sum(
        replicas * max(gpus, ranks)
        for replicas, gpus in (
            (prefill_engines(manifest), resources.prefill_gpu),
            (decode_engines(manifest), resources.decode_gpu),
        )
        if gpus
    )
    if spec.kv_cache.hbm_dtype == "fp8" and device(manifest, machine) == "cpu" and not machine.avx512:
        yield f"kv_cache.hbm_dtype: fp8 {NO_FP8}; no worker will start"
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
