"""Engines behind one interface: vLLM, and a simulated one for tests of scale and scheduling."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

from llmserve.bus.messages import Role
from llmserve.manifests.machine import probe_machine
from llmserve.manifests.models import ModelError, ModelFiles, ModelShape, hub_folder, model_shape, resolve_model
from llmserve.manifests.plan_warnings import NO_FP8, NO_PIPELINE_ON_CPUS
from llmserve.manifests.schema import Manifest
from llmserve.manifests.sizes import (
    block_size,
    decode_engines,
    device,
    engine_kv_space_bytes,
    engine_ranks,
    engine_transfer_gbps,
    max_model_len,
    page_shape,
    prefill_engines,
    with_dtype,
)
from llmserve.workers.engine.base import Engine, EngineError

if TYPE_CHECKING:
    from llmserve.workers.engine.vllm_config import VllmOptions

EngineMode = Literal["auto", "thread", "process"]
"""Where a vLLM core runs. ``auto``: in a thread if the engine is this process's only one, on one CPU rank."""

_SMOLLM2 = ModelShape(layers=30, kv_heads=3, head_dim=64, dtype_bytes=2, max_position_embeddings=8192)
"""Shape of a simulated model whose files are not here."""


def make_engine(
    manifest: Manifest,
    role: str,
    mode: EngineMode = "auto",
    *,
    engines_here: int | None = None,
    host: str = "127.0.0.1",
    gpus: tuple[str, ...] = (),
) -> Engine:
    """The engine of one replica, not started. May take seconds: the packaged model is converted at its first use.

    ``engines_here`` share this machine's cores, all of the manifest's by default. ``host`` is where engines of other
    processes reach this one. ``gpus`` are the engine's, all that the process sees by default.
    Raises ``EngineError``.
    """
    manifest = with_dtype(manifest, probe_machine())
    try:
        if manifest.spec.engine.kind == "simulated":
            return _simulated(manifest, host)
        return _vllm(manifest, Role(role), mode, engines_here or _engines(manifest), host, gpus)
    except ModelError as error:
        raise EngineError(str(error)) from error


def preload(manifest: Manifest) -> None:
    """Begin to load, in the background, what the engine processes of this process will share; vLLM on CPUs only.

    To be called before vLLM is imported, since it sets the environment. May take seconds, as ``make_engine``.
    Raises ``EngineError``.
    """
    if manifest.spec.engine.kind != "vllm" or device(manifest, probe_machine()) != "cpu":
        return
    from llmserve.workers.engine.vllm_config import apply_environment
    from llmserve.workers.engine.vllm_fork import engine_context

    try:
        apply_environment(manifest, _options(manifest, "process", _engines(manifest), "", ()))
    except ModelError as error:
        raise EngineError(str(error)) from error
    engine_context()


def _vllm(
    manifest: Manifest, role: Role, mode: EngineMode, engines_here: int, host: str, gpus: tuple[str, ...]
) -> Engine:
    from llmserve.workers.engine.vllm import VllmEngine

    return VllmEngine(manifest, role, _options(manifest, mode, engines_here, host, gpus))


def _options(
    manifest: Manifest, mode: EngineMode, engines_here: int, host: str, gpus: tuple[str, ...]
) -> VllmOptions:
    from llmserve.workers.engine.vllm_config import VllmOptions

    files = resolve_model(manifest.spec.models.primary.id)
    draft = manifest.spec.models.draft
    machine = probe_machine()
    on = device(manifest, machine)
    alone = on == "cpu" and engine_ranks(manifest) == 1
    if on == "cpu" and (stages := manifest.spec.models.primary.pipeline_parallel) > 1:
        raise EngineError(f"spec.models.primary.pipeline_parallel: {stages} {NO_PIPELINE_ON_CPUS}")
    if on == "cpu" and manifest.spec.kv_cache.hbm_dtype == "fp8" and not machine.avx512:
        raise EngineError(f"spec.kv_cache.hbm_dtype: fp8 {NO_FP8}")
    return VllmOptions(
        model_path=files.path,
        model_local=files.local,
        mode=mode if mode != "auto" else "thread" if alone else "process",
        device=on,
        threads=_threads(len(os.sched_getaffinity(0)), engines_here),
        block_tokens=_block_tokens(manifest, files, on),
        draft_path=resolve_model(draft.id).path if draft is not None and draft.enabled else None,
        kv_bytes=engine_kv_space_bytes(manifest, on),
        host=host,
        io_share=1 / decode_engines(manifest),
        gpus=gpus if on == "cuda" else (),
    )


def _engines(manifest: Manifest) -> int:
    return prefill_engines(manifest) + decode_engines(manifest)


def _threads(cores: int, engines: int) -> int:
    """CPU threads of one engine: twice its part of the cores, since a prefill and a decode engine are rarely busy at
    the same moment, and an idle machine's first token should not wait for one core while the other rests."""
    return max(1, min(cores, 2 * cores // engines))


def _block_tokens(manifest: Manifest, files: ModelFiles, on: Literal["cpu", "cuda"]) -> int | None:
    wish_kb = manifest.spec.kv_cache.page_size_kb
    if wish_kb is None:
        return None
    folder = files.path if files.local else hub_folder(files.model_id)
    if folder is None:
        raise EngineError(
            f"spec.kv_cache.page_size_kb needs the shape of {files.model_id!r}, which is not here: download it first"
        )
    return block_size(page_shape(manifest, model_shape(folder)), wish_kb, on).tokens


def _simulated(manifest: Manifest, host: str) -> Engine:
    from llmserve.manifests.schema import Simulated
    from llmserve.workers.engine.simulated import SimulatedEngine, SimulatedSettings, Timing
    from llmserve.workers.engine.simulated_sequence import Limits

    spec = manifest.spec
    if spec.models.draft is not None and spec.models.draft.enabled:
        raise EngineError("spec.models.draft: the simulated engine does not speculate; set enabled: false")
    shape = page_shape(manifest, _shape_here(spec.models.primary.id))
    block = block_size(shape, spec.kv_cache.page_size_kb, "cpu")
    page_bytes = block.tokens * shape.token_bytes
    model = spec.engine.simulated or Simulated()
    io_gbps = engine_transfer_gbps(manifest)
    policies = spec.scheduling.policies
    return SimulatedEngine(
        SimulatedSettings(
            limits=Limits(
                slots=spec.engine.max_num_seqs or 256,
                step_tokens=spec.engine.max_num_batched_tokens or 2048,
                pages=max(1, (engine_kv_space_bytes(manifest, "cpu") or 0) // page_bytes),
                page_tokens=block.tokens,
                max_model_len=max_model_len(manifest, shape),
                chunked=policies.chunked_prefill,
                long_prompt_tokens=policies.prefill_long_prompt_tokens,
                prefix_cache=spec.kv_cache.prefix_caching,
            ),
            timing=Timing(
                step_s=model.step_ms / 1e3,
                prefill_s_per_token=model.prefill_us_per_token / 1e6,
                decode_s_per_request=model.decode_us_per_request / 1e6,
                transfer_bits_per_s=min(model.transfer_gbps, io_gbps or model.transfer_gbps) * 1e9,
            ),
            page_bytes=page_bytes,
            lease_s=spec.transfer.lease_s,
            transfer_timeout_s=spec.transfer.timeout_s,
            host=host,
            model=spec.models.primary.id.replace("/", "-"),
        )
    )


def _shape_here(model_id: str) -> ModelShape:
    files = resolve_model(model_id)
    folder = files.path if files.local else hub_folder(model_id)
    return _SMOLLM2 if folder is None else model_shape(folder)
