"""From the manifest to vLLM's arguments; no vLLM is loaded."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from llmserve.bus.messages import Role
from llmserve.manifests.schema import Manifest
from llmserve.manifests.sizes import Device
from llmserve.workers.engine.base import EngineError
from llmserve.workers.engine.vllm_config import VllmOptions, check_cache_dtype, engine_args, environment

OPTIONS = VllmOptions(model_path="/models/m", model_local=True)


def manifest(**spec: Any) -> Manifest:
    primary = spec.pop("primary", {})
    whole = {"metadata": {"name": "t"}, "spec": {"models": {"primary": {"id": "m", **primary}}} | spec}
    draft = spec.pop("draft", None)
    if draft is not None:
        whole["spec"].pop("draft")
        whole["spec"]["models"]["draft"] = draft
    return msgspec.convert(whole, Manifest)


def args(role: Role = Role.DECODE, options: VllmOptions = OPTIONS, **spec: Any) -> dict[str, Any]:
    return engine_args(manifest(**spec), role, options, "id-1")


@pytest.mark.parametrize(("dtype", "wanted"), [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")])
def test_dtype_reaches_vllm_by_its_own_name(dtype: str, wanted: str) -> None:
    assert args(primary={"dtype": dtype})["dtype"] == wanted


def test_parallelism_and_length_reach_vllm() -> None:
    made = args(primary={"tensor_parallel": 2, "pipeline_parallel": 3, "max_model_len": 99})
    assert (made["tensor_parallel_size"], made["pipeline_parallel_size"], made["max_model_len"]) == (2, 3, 99)


def test_what_the_manifest_leaves_open_is_left_to_vllm() -> None:
    made = args(options=VllmOptions("/m", True, device="cuda"))
    assert not {
        "max_model_len",
        "max_num_seqs",
        "block_size",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
    } & set(made)


@pytest.mark.parametrize(
    ("device", "asked", "caching", "wanted"),
    [
        ("cpu", None, True, True),
        ("cuda", None, True, False),
        ("cuda", True, True, True),
        ("cpu", False, True, False),
        ("cpu", True, False, False),
    ],
)
def test_pages_move_ahead_where_that_gains_unless_the_manifest_says_otherwise(
    device: Device, asked: bool | None, caching: bool, wanted: bool
) -> None:
    options = VllmOptions("/m", True, device=device)
    made = args(Role.PREFILL, options, transfer={"ahead": asked}, kv_cache={"prefix_caching": caching})
    assert made["kv_transfer_config"]["kv_connector_extra_config"]["ahead"] is wanted


def test_without_chunks_a_step_holds_the_longest_prompt() -> None:
    policies = {"policies": {"chunked_prefill": False}}
    made = args(scheduling=policies, primary={"max_model_len": 9000})
    assert made["enable_chunked_prefill"] is False
    assert made["max_num_batched_tokens"] == 9000
    with pytest.raises(EngineError, match=r"max_num_batched_tokens is 100: .*9000"):
        args(scheduling=policies, primary={"max_model_len": 9000}, engine={"max_num_batched_tokens": 100})


def test_long_prompts_are_cut_as_the_manifest_says() -> None:
    made = args(scheduling={"policies": {"prefill_long_prompt_tokens": 512}}, primary={"max_model_len": 256})
    assert made["long_prefill_token_threshold"] == 256
    with pytest.raises(EngineError, match="needs chunked_prefill"):
        args(scheduling={"policies": {"prefill_long_prompt_tokens": 512, "chunked_prefill": False}})


@pytest.mark.parametrize(("asked", "wanted"), [("auto", "auto"), ("bf16", "auto"), ("fp16", "auto"), ("fp8", "fp8")])
def test_kv_type_reaches_vllm(asked: str, wanted: str) -> None:
    assert args(kv_cache={"hbm_dtype": asked})["kv_cache_dtype"] == wanted


def test_an_unquantized_kv_type_must_be_the_models() -> None:
    check_cache_dtype("bf16", "bfloat16")
    check_cache_dtype("fp8", "bfloat16")
    with pytest.raises(EngineError, match="hbm_dtype is fp16, but the model runs in bfloat16"):
        check_cache_dtype("fp16", "bfloat16")


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE, Role.BOTH])
def test_the_draft_is_loaded_by_prefill_workers_too_since_its_pages_are_handed_over(role: Role) -> None:
    made = args(role, draft={"id": "d", "speculative_tokens": 3})
    assert made["speculative_config"] == {"method": "draft_model", "model": "d", "num_speculative_tokens": 3}


def test_pages_with_and_without_a_draft_are_of_different_kinds() -> None:
    specs: tuple[dict[str, Any], ...] = ({}, {"draft": {"id": "d"}})
    kinds = {args(**spec)["kv_transfer_config"]["kv_connector_extra_config"]["model_id"] for spec in specs}
    assert kinds == {"m", "m + d"}


def test_a_disabled_draft_is_not_loaded() -> None:
    assert "speculative_config" not in args(draft={"id": "d", "enabled": False})


@pytest.mark.parametrize(
    ("role", "kv_role"), [(Role.PREFILL, "kv_producer"), (Role.DECODE, "kv_consumer"), (Role.BOTH, None)]
)
def test_roles_decide_over_the_connector(role: Role, kv_role: str | None) -> None:
    transfer = args(role).get("kv_transfer_config")
    assert (transfer or {}).get("kv_role") == kv_role


def test_failed_reads_are_recomputed_and_transfer_settings_reach_the_connector() -> None:
    made = args(transfer={"lease_s": 7, "timeout_s": 3, "same_host": False})["kv_transfer_config"]
    assert (made["kv_load_failure_policy"], made["engine_id"]) == ("recompute", "id-1")
    extra = made["kv_connector_extra_config"]
    assert (extra["lease_s"], extra["timeout_s"], extra["engine_order"], extra["io_bytes_s"]) == (
        7,
        3,
        ["nixl"],
        None,
    )
    assert extra["same_host"] is False


def test_an_engine_gets_its_share_of_the_io_budget_in_bytes_for_each_rank() -> None:
    options = VllmOptions("/m", True, io_share=0.5)
    made = args(options=options, budgets={"max_kv_io_gbps": 8}, primary={"tensor_parallel": 2})
    assert made["kv_transfer_config"]["kv_connector_extra_config"]["io_bytes_s"] == 8e9 / 8 / 2 / 2


def test_kv_space_is_divided_among_the_ranks() -> None:
    assert args(engine={"kv_space_gb": 2}, primary={"tensor_parallel": 2})["kv_cache_memory_bytes"] == 2**30
    assert args(options=VllmOptions("/m", True, kv_bytes=100))["kv_cache_memory_bytes"] == 100
    assert args()["kv_cache_memory_bytes"] == 2**30


def test_an_engines_gpus_go_with_its_configuration_into_its_process() -> None:
    made = args(options=VllmOptions("/m", True, device="cuda", gpus=("2", "3")))
    assert made["additional_config"] == {"llmserve_gpus": "2,3"}
    assert "additional_config" not in args()


def test_several_ranks_need_a_process() -> None:
    with pytest.raises(EngineError, match="need an engine process"):
        args(options=VllmOptions("/m", True, mode="thread"), primary={"tensor_parallel": 2})


def test_the_environment_names_what_must_be_and_what_may_be_changed() -> None:
    forced, default = environment(manifest(engine={"enforce_eager": True}), VllmOptions("/m", True, threads=3))
    assert (forced["OMP_NUM_THREADS"], forced["HF_HUB_OFFLINE"]) == ("3", "1")
    assert (default["VLLM_CPU_OMP_THREADS_BIND"], default["TORCH_COMPILE_DISABLE"]) == ("nobind", "1")
    forced, default = environment(manifest(), VllmOptions("org/m", False, device="cuda"))
    assert "HF_HUB_OFFLINE" not in forced
    assert "TORCH_COMPILE_DISABLE" not in default
