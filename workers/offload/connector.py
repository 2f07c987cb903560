"""The connector class that vLLM loads for the tiers: ``TierConnector``."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata, KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.v1.kv_cache_interface import AttentionSpec, iter_layer_specs
from vllm.v1.kv_offload.tiering.manager import TieringOffloadingManager

from llmserve.kvstore.codec import PageKind, ValueType
from llmserve.kvstore.quantize import group_size
from llmserve.workers.connector import layout
from llmserve.workers.connector.meta import RankMeta
from llmserve.workers.offload.tier import PageTier

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = logging.getLogger("vllm.llmserve.tiers")

_CONNECTORS = {
    "LLMServeConnector": "llmserve.workers.connector.connector",
    "TierConnector": "llmserve.workers.offload.connector",
}
_VALUES: dict[str, ValueType] = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


class TierConnector(OffloadingConnector):  # type: ignore[misc]  # vLLM is untyped
    """vLLM's offloading connector over our tiers. Pages are named by the fingerprint of the engine's pages, which
    only the workers know: they tell it in the handshake that vLLM offers to connectors."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        for name, module in _CONNECTORS.items():
            # By name vLLM finds the class of the statistics that come from other processes.
            if name not in KVConnectorFactory._registry:
                KVConnectorFactory.register_connector(name, module, name)
        super().__init__(vllm_config, role, kv_cache_config)
        self._config = vllm_config
        self._meta: RankMeta | None = None
        self.transports = ""
        """Its engines move no pages between workers."""
        self.page_bytes = 0
        """Of this rank, over all its layers; known once the caches are registered."""

    @property
    def fingerprint(self) -> str:
        """Of this rank's pages; known once the caches are registered."""
        return self._meta.fingerprint if self._meta else ""

    # -- worker -------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        super().register_kv_caches(kv_caches)
        config = self._kv_cache_config
        names = layout.in_order(config.kv_cache_groups[config.transfer_group_ids[0]].layer_names)
        sample = kv_caches[names[0]]
        extra: dict[str, Any] = self._kv_transfer_config.kv_connector_extra_config
        on_cpu = sample.device.type == "cpu"
        kind = layout.fingerprint(self._config, extra["model_id"], sample.shape[1:], on_cpu=on_cpu)
        self.page_bytes = sum(tensor.size for tensor in config.kv_cache_tensors) // config.num_blocks
        self._meta = RankMeta(kind, b"")

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        return self._meta

    # -- scheduler ----------------------------------------------------------------------------------------------

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        kinds = {meta.fingerprint for meta in metadata.values() if isinstance(meta, RankMeta)}
        manager = self.scheduler.manager
        assert isinstance(manager, TieringOffloadingManager)
        if len(kinds) != 1:
            logger.error("the ranks' pages are of different kinds, nothing is kept below DRAM: %s", sorted(kinds))
            return
        for tier in manager.secondary_tiers:
            assert isinstance(tier, PageTier)
            kind = self._kind(tier.block_size_bytes)
            tier.open(kinds.copy().pop(), kind, int(self._config.cache_config.block_size))

    def _kind(self, page_bytes: int) -> PageKind:
        cache_dtype = str(self._config.cache_config.cache_dtype)
        model_dtype = str(self._config.model_config.dtype).removeprefix("torch.")
        values = "fp8" if cache_dtype.startswith("fp8") else _VALUES.get(model_dtype, "fp32")
        specs = [
            spec for group in self._kv_cache_config.kv_cache_groups for spec in iter_layer_specs(group.kv_cache_spec)
        ]
        attention = [spec for spec in specs if isinstance(spec, AttentionSpec)]
        # State of other layers is no keys and values: not to be quantized.
        group = group_size([spec.head_size for spec in attention]) if len(attention) == len(specs) else None
        return PageKind(values, page_bytes, group)
