"""The connector class that vLLM loads: ``LLMServeConnector``. It only sorts calls to its two halves."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from llmserve.kvstore.transfer import SAME_HOST
from llmserve.kvstore.transfer.base import EngineOptions, Place, Region
from llmserve.kvstore.transfer.pacing import TokenBucket
from llmserve.workers.connector import layout
from llmserve.workers.connector.at_once import AtOnce
from llmserve.workers.connector.lease_check import LeaseCheck
from llmserve.workers.connector.leases import LeaseTable
from llmserve.workers.connector.meta import RankMeta, StepMeta, TransferStats
from llmserve.workers.connector.movers import LadderOptions, device_mark, open_mover
from llmserve.workers.connector.scheduler import SchedulerSettings, SchedulerSide
from llmserve.workers.connector.wire import Handoff, RankPages, encode, rank_key
from llmserve.workers.connector.worker import WorkerSide

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

_UNSPLIT_TOKENS = 64
"""Pages of more tokens are several blocks to some attention kernels, which must then touch within a layer."""
_AT_ONCE_BYTES = {"cpu": 64 << 20, "cuda": 2 << 30}
"""What a load in a step may hold up the other requests for: some ten milliseconds on CPUs, two or three on GPUs."""
_BURST_S = 0.1
"""Seconds at the full rate that may pass at once."""


class LLMServeConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]  # vLLM is untyped
    """Hands KV pages from a prefill engine to a decode engine; see ``docs/handoff.md``.

    ``kv_connector_extra_config``: ``lease_s``, ``timeout_s``, ``engine_order``, ``same_host``,
    ``nixl_backend_policy``, ``ucx_rdma``, ``host`` (where peers reach this end), ``model_id``, ``io_bytes_s`` (None
    is no bound), ``ahead`` (offer pages while their prompt is still computed), ``join_layers`` (a page is one run of
    bytes over all layers, if it is not too large) and
    ``held_poll_s``, the pause between polls of an engine that only holds pages.
    """

    _cache_hit_source = CacheHitSource.P2P

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._extra: dict[str, Any] = self._kv_transfer_config.kv_connector_extra_config
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._rank_meta: RankMeta | None = None
        self.page_bytes = 0
        """Of this rank, over all its layers; known once the caches are registered."""
        self.transports = ""
        """The transfer engines of this rank, and why others are not there."""
        self._leases: LeaseCheck | None = None
        if role == KVConnectorRole.SCHEDULER:
            at_once = AtOnce(self._at_once_tokens(), vllm_config.parallel_config.tensor_parallel_size, self._stands)
            self._scheduler = SchedulerSide(
                self._settings(),
                lambda name: self._kv_cache_manager.get_block_ids(name),
                at_once,
                lambda pages: self._kv_cache_manager.evict_blocks(pages),
            )

    def _at_once_tokens(self) -> int:
        """How many tokens' pages may be loaded in the step that computes with them; 0: never.

        Not with a bound on bytes a second, which may put any transfer off; nor with tiers, which could store pages
        before they are certain; nor with drafts, several groups of pages or pipelines, where vLLM's steps differ.
        """
        config, cache = self._vllm_config, self._kv_cache_config
        alone = self._kv_transfer_config.kv_connector == type(self).__name__
        plain = (
            len(cache.kv_cache_groups) == 1
            and config.parallel_config.pipeline_parallel_size == 1
            and config.speculative_config is None
        )
        if not (alone and plain and self._extra["same_host"]) or self._extra.get("io_bytes_s"):
            return 0
        page_bytes = sum(tensor.size for tensor in cache.kv_cache_tensors) // cache.num_blocks
        pages: int = _AT_ONCE_BYTES.get(config.device_config.device_type, 0) // page_bytes
        return pages * int(cache.kv_cache_groups[0].kv_cache_spec.block_size)

    def _stands(self, handoff: Handoff) -> bool:
        if self._leases is None:
            self._leases = LeaseCheck(handoff.fingerprint)
        return self._leases.stands(handoff)

    def _settings(self) -> SchedulerSettings:
        groups = tuple(self._kv_cache_config.transfer_group_ids)
        specs = [self._kv_cache_config.kv_cache_groups[g].kv_cache_spec for g in groups]
        parallel = self._vllm_config.parallel_config
        return SchedulerSettings(
            engine_id=self._kv_transfer_config.engine_id,
            lease_s=self._extra["lease_s"],
            tp=parallel.tensor_parallel_size,
            pp=parallel.pipeline_parallel_size,
            groups=groups,
            page_tokens=tuple(spec.block_size for spec in specs),
            slots=self._kv_cache_config.num_blocks,
            ahead=self._extra["ahead"] and self._keeps_pages(groups),
        )

    def _keeps_pages(self, groups: tuple[int, ...]) -> bool:
        """Whether a running prompt loses no page, as it does to a sliding window."""
        from vllm.v1.kv_cache_interface import FullAttentionSpec

        specs = [self._kv_cache_config.kv_cache_groups[group].kv_cache_spec for group in groups]
        return len(specs) == 1 and isinstance(specs[0], FullAttentionSpec) and specs[0].sliding_window is None

    @property
    def scheduler_side(self) -> SchedulerSide:
        assert self._scheduler is not None
        return self._scheduler

    @property
    def worker_side(self) -> WorkerSide:
        assert self._worker is not None
        return self._worker

    @property
    def fingerprint(self) -> str:
        """Of this rank's pages; known once the caches are registered."""
        return self._rank_meta.fingerprint if self._rank_meta else ""

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        # Latent attention has a single layout. With the others a page is one run of bytes, over all layers (B before
        # L) where that is to be had.
        model = vllm_config.model_config
        if model is None or model.use_mla:
            return None
        wanted = vllm_config.kv_transfer_config.kv_connector_extra_config["join_layers"]
        return "BLHNC" if wanted and vllm_config.cache_config.block_size <= _UNSPLIT_TOKENS else "LBHNC"

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        return TransferStats(data)

    # -- scheduler ----------------------------------------------------------------------------------------------

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        self.scheduler_side.set_ranks({rank: m for rank, m in metadata.items() if isinstance(m, RankMeta)})

    def on_new_request(self, request: Request) -> None:
        self.scheduler_side.on_new_request(request)

    def get_loaded_kv_cache_group_ids(self, request: Request) -> tuple[int, ...]:
        return tuple(self._kv_cache_config.transfer_group_ids)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self.scheduler_side.matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        self.scheduler_side.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        preempted = scheduler_output.preempted_req_ids or ()
        return self.scheduler_side.take_meta(scheduler_output.num_scheduled_tokens, preempted)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        self.scheduler_side.on_output(connector_output)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        from vllm.v1.request import RequestStatus

        hold = request.status == RequestStatus.FINISHED_LENGTH_CAPPED
        return self.scheduler_side.finished(request, block_ids, hold=hold)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def has_pending_push_work(self) -> bool:
        # Read by the engine's loop: a step is due although no request is left.
        return self._scheduler is not None and self._scheduler.has_work()

    # -- worker -------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        from vllm.distributed.parallel_state import get_pp_group, get_tensor_model_parallel_rank

        config = self._kv_cache_config
        groups = [config.kv_cache_groups[g] for g in config.transfer_group_ids]
        names = [layout.in_order(group.layer_names) for group in groups]
        strips = [
            layout.joined([layout.strip_of(n, kv_caches[n], config.num_blocks) for n in layers]) for layers in names
        ]
        self.page_bytes = sum(strip.page_bytes for layers in strips for strip in layers)
        sample = kv_caches[names[0][0]]
        on_cpu = sample.device.type == "cpu"
        place = Place(None if on_cpu else sample.device.index or 0)
        kind = layout.fingerprint(self._vllm_config, self._extra["model_id"], sample.shape[1:], on_cpu=on_cpu)
        table, fence = LeaseTable(config.num_blocks), WorkerSide.fence_table()
        regions = layout.regions_of({n: kv_caches[n] for layers in names for n in layers}, place)
        regions += [Region(t.address, t.size_bytes, Place()) for t in (table, fence)]
        mover, self.transports = open_mover(
            self._ladder(place, kind, min(s.page_bytes for layers in strips for s in layers)), regions, self._bucket()
        )
        self._worker = WorkerSide(
            mover,
            strips=strips,
            place=place,
            table=table,
            fence=fence,
            rank=rank_key(get_pp_group().rank_in_group, get_tensor_model_parallel_rank()),
            timeout_s=self._extra["timeout_s"],
            mark=device_mark(place),
        )
        tuples = [[(s.base, s.stride_bytes, s.page_bytes) for s in layers] for layers in strips]
        self._rank_meta = RankMeta(kind, encode(RankPages(mover.ends, place.gpu, tuples, table.address)))

    def _ladder(self, place: Place, kind: str, piece_bytes: int) -> LadderOptions:
        extra = self._extra
        options = EngineOptions(
            gpu=place.gpu,
            fingerprint=kind,
            host=extra["host"],
            nixl_backend_policy=extra["nixl_backend_policy"],
            ucx_rdma=extra["ucx_rdma"],
        )
        first = (SAME_HOST,) if extra["same_host"] else ()
        return LadderOptions((*first, *extra["engine_order"]), options, piece_bytes)

    def _bucket(self) -> TokenBucket:
        rate = self._extra.get("io_bytes_s") or math.inf
        return TokenBucket(rate, max(rate * _BURST_S, 1.0), time.monotonic())

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        return self._rank_meta

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        assert isinstance(kv_connector_metadata, StepMeta)
        self.worker_side.disarm(kv_connector_metadata)

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        meta = self._get_connector_metadata()
        assert isinstance(meta, StepMeta)
        return self.worker_side.take_said(meta.computed)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        meta = self._get_connector_metadata()
        assert isinstance(meta, StepMeta)
        self.worker_side.begin(meta)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        meta = self._get_connector_metadata()
        assert isinstance(meta, StepMeta)
        results = self.worker_side.advance()
        if meta.idle and not results.sent and self.worker_side.only_waits:
            # vLLM steps an engine that only holds pages a thousand times a second.
            time.sleep(self._extra["held_poll_s"])
        return KVConnectorTransferResults(results.sent, results.received, results.failed)

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        if self._scheduler is not None:
            return self._scheduler.take_stats()
        return self._worker.take_stats() if self._worker is not None else None

    def wait_for_layer_load(self, layer_name: str) -> None:
        """The device waits for all pages of a load, or the request is not run before they are here."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Pages are read by the consumer."""

    def wait_for_save(self) -> None:
        """See ``save_kv_layer``."""

    def shutdown(self) -> None:
        if self._leases is not None:
            self._leases.close()
            self._leases = None
        if self._worker is not None:
            self._worker.close()
            self._worker = None
