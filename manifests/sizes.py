"""Sizes that follow from the manifest and the model's shape: blocks, pages, KV space, shares of budgets."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, NamedTuple, TypeAlias

import msgspec

from llmserve.manifests.machine import Machine
from llmserve.manifests.models import ModelShape
from llmserve.manifests.schema import Manifest

GB = 2**30
KB = 2**10
Device: TypeAlias = Literal["cpu", "cuda"]

_CPU_KV_SPACE_BYTES = GB
_BLOCK_STEP_TOKENS: dict[Device, int] = {"cpu": 32, "cuda": 16}
"""vLLM's attention kernels: the CPU's take multiples of 32 tokens, FlashAttention multiples of 16."""
_BLOCK_DEFAULT_TOKENS: dict[Device, int] = {"cpu": 128, "cuda": 16}
_KV_VALUE_BYTES = {"fp8": 1, "bf16": 2, "fp16": 2, "fp32": 4}


class BlockSize(NamedTuple):
    """The KV block that comes nearest to ``page_size_kb``."""

    tokens: int
    actual_kb: float
    note: str
    """Why it is not the wish exactly; empty if it is."""


def device(manifest: Manifest, machine: Machine) -> Device:
    """What the engines run on: GPUs if the manifest asks for them and, unless others will run them, some are here."""
    spec = manifest.spec
    asked = spec.deployment.resources.prefill_gpu + spec.deployment.resources.decode_gpu
    if not asked or spec.engine.kind == "simulated":
        return "cpu"
    return "cuda" if machine.gpus or spec.deployment.mode == "k8s" else "cpu"


def with_dtype(manifest: Manifest, machine: Machine) -> Manifest:
    """``manifest`` with ``models.primary.dtype: auto`` decided where that must not be left to vLLM: it takes the
    model's own type, which is bf16 as a rule, and an x86 CPU without AVX-512 is about nine times faster in fp32."""
    spec = manifest.spec
    if machine.avx512 or device(manifest, machine) != "cpu" or spec.engine.kind == "simulated":
        return manifest
    # A width of the cache's own, bf16 or fp16, is that of the model.
    if spec.models.primary.dtype != "auto" or spec.kv_cache.hbm_dtype != "auto":
        return manifest
    primary = msgspec.structs.replace(spec.models.primary, dtype="fp32")
    models = msgspec.structs.replace(spec.models, primary=primary)
    return msgspec.structs.replace(manifest, spec=msgspec.structs.replace(spec, models=models))


def max_model_len(manifest: Manifest, shape: ModelShape) -> int:
    """Tokens of prompt and output together."""
    return manifest.spec.models.primary.max_model_len or shape.max_position_embeddings


def page_shape(manifest: Manifest, shape: ModelShape) -> ModelShape:
    """The part of the model whose KV one rank holds, with the width of one KV value as ``dtype_bytes``."""
    primary, hbm_dtype = manifest.spec.models.primary, manifest.spec.kv_cache.hbm_dtype
    dtype = primary.dtype if hbm_dtype == "auto" else hbm_dtype
    return replace(
        shape,
        layers=-(-shape.layers // primary.pipeline_parallel),
        # More ranks than KV heads: each rank keeps a copy of one head.
        kv_heads=max(1, shape.kv_heads // primary.tensor_parallel),
        dtype_bytes=_KV_VALUE_BYTES.get(dtype, shape.dtype_bytes),
        max_position_embeddings=max_model_len(manifest, shape),
    )


def block_size(shape: ModelShape, page_size_kb: int | None, device: Device) -> BlockSize:
    """The block whose page, over all of ``shape``'s layers, is nearest to ``page_size_kb``; see ``page_shape``."""
    step = _BLOCK_STEP_TOKENS[device]
    if page_size_kb is None:
        tokens = _BLOCK_DEFAULT_TOKENS[device]
        return BlockSize(tokens, tokens * shape.token_bytes / KB, "")
    # A block longer than the longest request would only waste its end.
    largest = max(1, -(-shape.max_position_embeddings // step))
    steps = min(max(1, round(page_size_kb * KB / (step * shape.token_bytes))), largest)
    tokens = steps * step
    actual_kb = tokens * shape.token_bytes / KB
    if actual_kb == page_size_kb:
        return BlockSize(tokens, actual_kb, "")
    kind = "GPU" if device == "cuda" else "CPU"
    note = f"{page_size_kb} KB asked for, {actual_kb:g} KB is nearest: {kind} blocks are multiples of {step} tokens"
    return BlockSize(tokens, actual_kb, note)


def prefill_engines(manifest: Manifest) -> int:
    return manifest.spec.deployment.replicas.prefill


def decode_engines(manifest: Manifest) -> int:
    return manifest.spec.deployment.replicas.decode


def engine_ranks(manifest: Manifest) -> int:
    """Processes or GPUs over which one engine spreads."""
    return manifest.spec.models.primary.tensor_parallel * manifest.spec.models.primary.pipeline_parallel


def engine_kv_space_bytes(manifest: Manifest, device: Device) -> int | None:
    """KV space of one engine over all its ranks; None leaves it to vLLM, which measures what is free on GPUs.

    The smaller of ``engine.kv_space_gb`` (on CPUs 1 GB by default) and the engine's share of ``max_kv_hbm_gb``.
    """
    bounds: list[int] = []
    if manifest.spec.engine.kv_space_gb is not None:
        bounds.append(int(manifest.spec.engine.kv_space_gb * GB))
    elif device == "cpu":
        bounds.append(_CPU_KV_SPACE_BYTES)
    if manifest.spec.budgets.max_kv_hbm_gb is not None:
        engines = prefill_engines(manifest) + decode_engines(manifest)
        bounds.append(int(manifest.spec.budgets.max_kv_hbm_gb * GB / engines))
    return min(bounds, default=None)


def engine_transfer_gbps(manifest: Manifest) -> float | None:
    """Rate in 10**9 bits a second at which one decode engine may receive pages; None is no bound."""
    total = manifest.spec.budgets.max_kv_io_gbps
    return None if total is None else total / decode_engines(manifest)


def dram_bytes(manifest: Manifest) -> int | None:
    """DRAM tier of one engine; None without one."""
    kv_cache = manifest.spec.kv_cache
    if kv_cache.dram_gb is not None:
        return int(kv_cache.dram_gb * GB)
    return GB if manifest.spec.storageClasses else None


TIER_IO_PART = 0.5
"""Of ``budgets.max_kv_io_gbps`` for the tiers, where there are some; handoffs have the rest."""


def tier_io_bytes_s(manifest: Manifest) -> float | None:
    """Bytes a second that one engine, or the kv manager, may move to and from storage classes; None is no bound."""
    gbps = manifest.spec.budgets.max_kv_io_gbps
    users = prefill_engines(manifest) + decode_engines(manifest) + 1
    return None if gbps is None else gbps * 1e9 / 8 * TIER_IO_PART / users
