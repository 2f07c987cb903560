"""Methods added to vLLM's workers (``worker_extension_cls``), called through the engine's ``collective_rpc``."""

from __future__ import annotations


class WorkerExtension:
    """What an engine's front has to know of its pages and can only be learnt in the worker."""

    def llmserve_pages(self) -> tuple[str, int, str]:
        """(fingerprint, bytes of one page on this rank, its transfer engines): no texts without a connector."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

        from llmserve.workers.connector.connector import LLMServeConnector
        from llmserve.workers.offload.connector import TierConnector

        if has_kv_transfer_group():
            connector = get_kv_transfer_group()
            # With tiers it is one of several.
            for part in getattr(connector, "sub_connectors", [connector]):
                if isinstance(part, LLMServeConnector | TierConnector):
                    return part.fingerprint, part.page_bytes, part.transports
        config = self.model_runner.kv_cache_config  # type: ignore[attr-defined]
        return "", sum(tensor.size for tensor in config.kv_cache_tensors) // config.num_blocks, ""
