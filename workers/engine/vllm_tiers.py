"""From the manifest to the part of vLLM's configuration that makes it keep pages below the engine's memory."""

from __future__ import annotations

from typing import Any

from llmserve.bus.messages import Role
from llmserve.kvstore.keys import hot_bytes
from llmserve.manifests.schema import Manifest
from llmserve.manifests.sizes import TIER_IO_PART, dram_bytes, tier_io_bytes_s
from llmserve.workers.offload.params import HOT_BYTES
from llmserve.workers.offload.settings import TierSettings, to_builtins


def with_tiers(
    manifest: Manifest, role: Role, engine_id: str, model_id: str, transfer: dict[str, Any] | None
) -> dict[str, Any] | None:
    """``transfer``, vLLM's ``KVTransferConfig`` for handoffs if the engine takes part in them, joined with the tiers
    if the manifest has some."""
    if (size := dram_bytes(manifest)) is None:
        return transfer
    tiers = {
        "kv_connector": "TierConnector",
        "kv_connector_module_path": "llmserve.workers.offload.connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": _tiers(manifest, role, model_id, size),
    }
    if transfer is None:
        return {**tiers, "engine_id": engine_id}
    handoffs = {name: value for name, value in transfer.items() if name != "engine_id"}
    # vLLM's offloading knows pages of one layer only.
    extra = handoffs["kv_connector_extra_config"] | {"join_layers": False}
    if extra.get("io_bytes_s") and manifest.spec.storageClasses:
        extra["io_bytes_s"] *= 1 - TIER_IO_PART
    return {
        "kv_connector": "MultiConnector",
        "kv_role": transfer["kv_role"],
        "kv_load_failure_policy": "recompute",
        "engine_id": engine_id,
        # What a prefill worker hands over goes before what the tiers have.
        "kv_connector_extra_config": {"connectors": [{**handoffs, "kv_connector_extra_config": extra}, tiers]},
    }


def _tiers(manifest: Manifest, role: Role, model_id: str, size_bytes: int) -> dict[str, Any]:
    spec = manifest.spec
    secondary = []
    if spec.storageClasses:
        settings = TierSettings(
            classes=spec.storageClasses,
            disk=spec.kv_cache.disk_dtype or "raw",
            encryption=spec.kv_cache.encryption,
            io_bytes_s=tier_io_bytes_s(manifest),
        )
        module = "llmserve.workers.offload.tier"
        secondary = [{"type": "PageTier", "module_path": module, **to_builtins(settings)}]
    return {
        "cpu_bytes_to_use": size_bytes,
        "spec_name": "PageTieringSpec",
        "spec_module_path": "llmserve.workers.offload.spec",
        "eviction_policy": "HotSetPolicy",
        "cache_policy_module_path": "llmserve.workers.offload.policy",
        "secondary_tiers": secondary,
        HOT_BYTES: hot_bytes(manifest),
        "model_id": model_id,
        # The pages of answers are the prefix of a conversation's next turn.
        "offload_prompt_only": role is Role.PREFILL,
    }
