"""From the manifest to vLLM's configuration."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from llmserve.bus.messages import Role
from llmserve.manifests.schema import Manifest
from llmserve.manifests.sizes import Device
from llmserve.workers.engine.base import EngineError
from llmserve.workers.engine.vllm_tiers import with_tiers

if TYPE_CHECKING:
    from vllm.config import VllmConfig

Mode = Literal["thread", "process"]
"""Where the engine core runs: in a thread of this process, one such engine a process, or in a child of its own."""

GPUS = "llmserve_gpus"
"""Key of ``VllmConfig.additional_config``, the way into the child process of one engine among several."""

_GIB = 2**30
_DTYPES = {"auto": "auto", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_CPU_KV_SPACE_GB = 1.0
_HELD_POLL_S = 0.003
_ROLES = {Role.PREFILL: "kv_producer", Role.DECODE: "kv_consumer"}


@dataclass(frozen=True, slots=True)
class VllmOptions:
    """What the manifest does not say, since it depends on the process and the machine."""

    model_path: str
    """Folder, or Hugging Face id."""
    model_local: bool
    """Nothing is to be downloaded."""
    mode: Mode = "process"
    device: Device = "cpu"
    threads: int = 1
    """CPU threads of the engine: cores divided by the engines that share them."""
    block_tokens: int | None = None
    """Tokens of a page, from ``kv_cache.page_size_kb``; vLLM's own choice otherwise."""
    draft_path: str | None = None
    kv_bytes: int | None = None
    """KV space over all ranks, if a budget allows less than the manifest's ``engine.kv_space_gb``."""
    sockets: str = ""
    """A private folder for the sockets of an engine in a process of its own."""
    host: str = "127.0.0.1"
    """Where engines of other processes reach this one."""
    io_share: float = 1.0
    """Part of ``budgets.max_kv_io_gbps`` that this engine may use."""
    gpus: tuple[str, ...] = ()
    """As ``CUDA_VISIBLE_DEVICES`` names them; all that the process sees by default."""


def engine_args(manifest: Manifest, role: Role, options: VllmOptions, engine_id: str) -> dict[str, object]:
    """Keyword arguments of vLLM's ``AsyncEngineArgs``. Raises ``EngineError`` for what vLLM cannot do."""
    spec = manifest.spec
    model, policies, engine = spec.models.primary, spec.scheduling.policies, spec.engine
    args: dict[str, object] = {
        "model": options.model_path,
        "dtype": _DTYPES[model.dtype],
        "tensor_parallel_size": model.tensor_parallel,
        "pipeline_parallel_size": model.pipeline_parallel,
        "enforce_eager": engine.enforce_eager,
        "enable_prefix_caching": spec.kv_cache.prefix_caching,
        "prefix_caching_hash_algo": "sha256_cbor",
        "kv_cache_dtype": "fp8" if spec.kv_cache.hbm_dtype == "fp8" else "auto",
        "enable_chunked_prefill": policies.chunked_prefill,
        "worker_extension_cls": "llmserve.workers.connector.extension.WorkerExtension",
        "disable_log_stats": False,
    }
    optional: dict[str, object | None] = {
        "max_model_len": model.max_model_len,
        "max_num_seqs": engine.max_num_seqs,
        "max_num_batched_tokens": _batched_tokens(manifest),
        "block_size": options.block_tokens,
        "long_prefill_token_threshold": _long_prefill(manifest),
        "gpu_memory_utilization": engine.gpu_memory_utilization if options.device == "cuda" else None,
        "kv_cache_memory_bytes": _kv_bytes(manifest, options),
        "speculative_config": _speculation(manifest, options),
        "kv_transfer_config": with_tiers(
            manifest, role, engine_id, _models(manifest), _kv_transfer(manifest, role, options, engine_id)
        ),
        "kv_events_config": _kv_events(manifest, options, engine_id),
        "distributed_executor_backend": _executor(manifest, options),
        "additional_config": {GPUS: ",".join(options.gpus)} if options.gpus else None,
    }
    return args | {name: value for name, value in optional.items() if value is not None}


def _ranks(manifest: Manifest) -> int:
    model = manifest.spec.models.primary
    return model.tensor_parallel * model.pipeline_parallel


def _executor(manifest: Manifest, options: VllmOptions) -> str | None:
    if _ranks(manifest) == 1 and options.device == "cpu":
        return "uni"
    if options.mode == "thread":
        raise EngineError("models.primary: tensor_parallel and pipeline_parallel above 1 need an engine process")
    return None


def _batched_tokens(manifest: Manifest) -> int | None:
    asked, whole = manifest.spec.engine.max_num_batched_tokens, manifest.spec.models.primary.max_model_len
    if manifest.spec.scheduling.policies.chunked_prefill or whole is None:
        return asked
    if asked is not None and asked < whole:
        raise EngineError(
            f"engine.max_num_batched_tokens is {asked}: without chunked_prefill at least max_model_len, "
            f"{whole}, is needed"
        )
    return asked or max(whole, 2048)


def _long_prefill(manifest: Manifest) -> int | None:
    policies, limit = manifest.spec.scheduling.policies, manifest.spec.models.primary.max_model_len
    tokens = policies.prefill_long_prompt_tokens
    if tokens is None:
        return None
    if not policies.chunked_prefill:
        raise EngineError("scheduling.policies.prefill_long_prompt_tokens needs chunked_prefill: true")
    return tokens if limit is None else min(tokens, limit)


def _kv_bytes(manifest: Manifest, options: VllmOptions) -> int | None:
    """Of one rank."""
    space_gb = manifest.spec.engine.kv_space_gb
    if space_gb is None and options.device == "cpu":
        space_gb = _CPU_KV_SPACE_GB
    whole = options.kv_bytes or (None if space_gb is None else int(space_gb * _GIB))
    return None if whole is None else whole // _ranks(manifest)


def _speculation(manifest: Manifest, options: VllmOptions) -> dict[str, object] | None:
    # Prefill workers load the draft as well: without its keys and values of the prompt, which are handed over with
    # the target model's, a decode worker's drafts are hardly ever accepted.
    draft = manifest.spec.models.draft
    if draft is None or not draft.enabled:
        return None
    return {
        "method": "draft_model",
        "model": options.draft_path or draft.id,
        "num_speculative_tokens": draft.speculative_tokens,
    }


def _models(manifest: Manifest) -> str:
    models = manifest.spec.models
    drafted = models.draft is not None and models.draft.enabled
    return f"{models.primary.id} + {models.draft.id}" if drafted and models.draft else models.primary.id


def _kv_transfer(manifest: Manifest, role: Role, options: VllmOptions, engine_id: str) -> dict[str, Any] | None:
    if role not in _ROLES:
        return None
    transfer, io_gbps = manifest.spec.transfer, manifest.spec.budgets.max_kv_io_gbps
    return {
        "kv_connector": "LLMServeConnector",
        "kv_connector_module_path": "llmserve.workers.connector.connector",
        "kv_role": _ROLES[role],
        "kv_load_failure_policy": "recompute",
        "engine_id": engine_id,
        "kv_connector_extra_config": {
            "lease_s": transfer.lease_s,
            "timeout_s": transfer.timeout_s,
            "engine_order": list(transfer.engine_order),
            "same_host": transfer.same_host,
            "nixl_backend_policy": transfer.nixl.backend_policy,
            "ucx_rdma": transfer.ucx is None or transfer.ucx.rdma,
            "host": options.host,
            "model_id": _models(manifest),
            "io_bytes_s": io_gbps * 1e9 / 8 * options.io_share / _ranks(manifest) if io_gbps else None,
            "ahead": _fetches_ahead(manifest, options),
            # CPUs have attention kernels for one run of bytes a layer only.
            "join_layers": options.device == "cuda",
            # A thread of this process waits on its queue instead.
            "held_poll_s": 0.0 if options.mode == "thread" else _HELD_POLL_S,
        },
    }


def _fetches_ahead(manifest: Manifest, options: VllmOptions) -> bool:
    """Without a prefix cache a decode engine could not keep what it fetches ahead."""
    ahead = manifest.spec.transfer.ahead
    wanted = options.device == "cpu" if ahead is None else ahead
    return wanted and manifest.spec.kv_cache.prefix_caching


def _kv_events(manifest: Manifest, options: VllmOptions, engine_id: str) -> object | None:
    """Where the engine tells what its prefix cache holds: a thread is asked directly, a child publishes."""
    if not manifest.spec.kv_cache.prefix_caching:
        return None
    if options.mode == "thread" or not options.sockets:
        return {"enable_kv_cache_events": True, "publisher": "null"}
    endpoint = f"ipc://{options.sockets}/{engine_id}"
    return {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": endpoint}


def environment(manifest: Manifest, options: VllmOptions) -> tuple[dict[str, str], dict[str, str]]:
    """(variables that must be so, variables that the user may have set otherwise)."""
    forced = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", "VLLM_NO_USAGE_STATS": "1"}
    default = {"VLLM_LOGGING_LEVEL": "WARNING"}
    if options.sockets:
        default["VLLM_RPC_BASE_PATH"] = options.sockets
    if _ranks(manifest) == 1 and options.device == "cpu":
        # Otherwise vLLM puts the only rank in a process of its own on CPUs.
        forced["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    nccl = manifest.spec.transfer.nccl
    if nccl is not None and not nccl.p2p:
        forced["NCCL_P2P_DISABLE"] = "1"
    if options.model_local:
        forced["HF_HUB_OFFLINE"] = "1"
    if options.device == "cpu":
        forced["OMP_NUM_THREADS"] = str(options.threads)
        default["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        # Idle OpenMP threads of one engine otherwise spin for milliseconds on the cores that another one computes on.
        default["GOMP_SPINCOUNT"] = "10000"
        if manifest.spec.engine.enforce_eager:
            # Otherwise the first request with logprobs compiles for half a minute.
            default["TORCH_COMPILE_DISABLE"] = "1"
    return forced, default


def apply_environment(manifest: Manifest, options: VllmOptions) -> None:
    """Set the environment for vLLM and its children; before vLLM is imported."""
    forced, default = environment(manifest, options)
    os.environ.update(forced)
    # It would seed the block hashes of vLLM, so that nobody else knew the names of its pages.
    os.environ.pop("PYTHONHASHSEED", None)
    for name, value in default.items():
        os.environ.setdefault(name, value)


def build_config(manifest: Manifest, role: Role, options: VllmOptions, engine_id: str) -> VllmConfig:
    """vLLM's configuration; imports vLLM, which takes seconds. Raises ``EngineError``."""
    from vllm.config import KVEventsConfig, KVTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

    args = engine_args(manifest, role, options, engine_id)
    if isinstance(transfer := args.get("kv_transfer_config"), dict):
        args["kv_transfer_config"] = KVTransferConfig(**transfer)
    if isinstance(events := args.get("kv_events_config"), dict):
        args["kv_events_config"] = KVEventsConfig(**events)
    try:
        config = AsyncEngineArgs(**args).create_engine_config()
    except (ValueError, OSError, NotImplementedError) as error:
        raise EngineError(f"vLLM refuses the configuration: {_one_line(error)}") from error
    check_cache_dtype(manifest.spec.kv_cache.hbm_dtype, str(config.model_config.dtype).removeprefix("torch."))
    return config


def check_cache_dtype(hbm_dtype: str, model_dtype: str) -> None:
    """vLLM keeps unquantized KV in the model's type only. Raises ``EngineError``."""
    if hbm_dtype in ("fp16", "bf16") and _DTYPES[hbm_dtype] != model_dtype:
        raise EngineError(
            f"kv_cache.hbm_dtype is {hbm_dtype}, but the model runs in {model_dtype}: allowed are auto, fp8, "
            "and the model's own type"
        )


def _one_line(error: Exception) -> str:
    # pydantic's own text adds the whole configuration.
    details = getattr(error, "errors", None)
    text = "; ".join(str(detail["msg"]) for detail in details()) if callable(details) else str(error)
    return " ".join(text.split())
