"""The plan's numbers, on machines that are only values."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmserve.manifests.loader import load, parse
from llmserve.manifests.machine import Gpu, Machine, has_avx512, parse_gpus, probe_machine
from llmserve.manifests.models import ModelShape
from llmserve.manifests.plan import make_plan
from llmserve.manifests.sizes import (
    GB,
    KB,
    Device,
    block_size,
    device,
    engine_kv_space_bytes,
    engine_transfer_gbps,
    page_shape,
    with_dtype,
)
from tests.manifests.samples import EXAMPLE, SHIPPED, manifest

SMOLLM2 = ModelShape(30, 3, 64, 2, 8192, weight_bytes=269_000_000)
MISTRAL = ModelShape(32, 8, 128, 2, 32768, weight_bytes=14_500_000_000)
LAPTOP = Machine(cores=2, memory_bytes=24 * GB, libraries={"nixl": "1.5.1"})
TWO_GPUS = Machine(cores=16, memory_bytes=128 * GB, gpus=(Gpu("H200", 139 * GB),) * 2)


def test_a_page_of_the_local_model_has_the_size_that_vllm_showed() -> None:
    assert block_size(SMOLLM2, None, "cpu") == (128, 2_949_120 / KB, "")


@pytest.mark.parametrize(
    ("wish_kb", "on", "tokens", "exact"),
    [(512, "cpu", 32, False), (720, "cpu", 32, True), (2000, "cpu", 96, False), (360, "cuda", 16, True)],
)
def test_the_block_nearest_to_the_wish_is_taken_and_rounding_is_told(
    wish_kb: int, on: Device, tokens: int, exact: bool
) -> None:
    block = block_size(SMOLLM2, wish_kb, on)
    assert block.tokens == tokens
    assert (block.note == "") == exact


@given(st.integers(1, 10**9), st.sampled_from(["cpu", "cuda"]), st.integers(1, 20_000))
def test_no_allowed_block_is_nearer_to_the_wish(wish_kb: int, on: Device, length: int) -> None:
    shape = ModelShape(30, 3, 64, 2, length)
    block = block_size(shape, wish_kb, on)
    step = 32 if on == "cpu" else 16
    allowed = range(step, max(step, length + step - 1) + 1, step)
    assert block.tokens in allowed
    assert block.actual_kb == block.tokens * shape.token_bytes / KB
    assert abs(block.actual_kb - wish_kb) == min(abs(tokens * shape.token_bytes / KB - wish_kb) for tokens in allowed)


def test_a_page_is_that_of_one_rank_in_the_width_of_the_cache() -> None:
    read = manifest("kv_cache: {hbm_dtype: fp8}", primary="id: m, tensor_parallel: 2, pipeline_parallel: 4")
    assert page_shape(read, MISTRAL).token_bytes == MISTRAL.token_bytes // (2 * 4 * 2)


def test_a_page_of_more_ranks_than_heads_holds_one_head() -> None:
    assert page_shape(manifest(primary="id: m, tensor_parallel: 8"), SMOLLM2).kv_heads == 1


@pytest.mark.parametrize(
    ("spec", "cpu_gb", "cuda_gb"),
    [
        ("", 1, None),
        ("engine: {kv_space_gb: 3}", 3, 3),
        ("budgets: {max_kv_hbm_gb: 8}, deployment: {replicas: {prefill: 1, decode: 3}}", 1, 2),
        ("budgets: {max_kv_hbm_gb: 1}", 0.5, 0.5),
        ("budgets: {max_kv_hbm_gb: 8}, engine: {kv_space_gb: 6}", 4, 4),
        ("budgets: {max_kv_hbm_gb: 8}, engine: {kv_space_gb: 3}", 3, 3),
    ],
)
def test_kv_space_is_the_smaller_of_the_engines_own_and_its_share(
    spec: str, cpu_gb: float, cuda_gb: float | None
) -> None:
    read = manifest(spec)
    assert engine_kv_space_bytes(read, "cpu") == cpu_gb * GB
    assert engine_kv_space_bytes(read, "cuda") == (None if cuda_gb is None else cuda_gb * GB)


def test_the_transfer_rate_is_divided_among_decode_engines() -> None:
    assert engine_transfer_gbps(parse(EXAMPLE, "example")) == 7.5
    assert engine_transfer_gbps(manifest()) is None


@pytest.mark.parametrize(
    ("spec", "machine", "expected"),
    [
        ("", TWO_GPUS, "cpu"),
        ("deployment: {resources: {prefill_gpu: 1, decode_gpu: 1}}", TWO_GPUS, "cuda"),
        ("deployment: {resources: {prefill_gpu: 1, decode_gpu: 1}}", LAPTOP, "cpu"),
        ("deployment: {mode: k8s, resources: {prefill_gpu: 1, decode_gpu: 1}}", LAPTOP, "cuda"),
        ("engine: {kind: simulated}, deployment: {resources: {prefill_gpu: 1, decode_gpu: 1}}", TWO_GPUS, "cpu"),
    ],
)
def test_the_device_follows_from_the_wish_and_the_machine(spec: str, machine: Machine, expected: Device) -> None:
    assert device(manifest(spec), machine) == expected


def test_the_plan_of_the_local_manifest() -> None:
    plan = make_plan(load(SHIPPED / "local.yaml"), LAPTOP, SMOLLM2)
    assert [(role.role, role.replicas, role.processes) for role in plan.roles] == [
        ("nats", 1, 1),
        ("gateway", 1, 0),
        ("router", 1, 0),
        ("prefill", 1, 1),
        ("decode", 1, 1),
    ]
    assert plan.pages == 182
    assert plan.max_model_len == 2048
    assert plan.memory_bytes == 3 * 600 * 2**20 + 2 * (269_000_000 + GB // 2)
    assert [(rung.engine, rung.available) for rung in plan.ladder] == [("same_host", True), ("nixl", True)]
    assert plan.warnings == ()


def test_the_plan_of_the_example() -> None:
    plan = make_plan(parse(EXAMPLE, "example"), LAPTOP, MISTRAL)
    assert (plan.device, plan.mode) == ("cuda", "k8s")
    assert [(role.role, role.replicas, role.gpus) for role in plan.roles[4:]] == [("prefill", 4, 2), ("decode", 8, 2)]
    assert plan.roles[3].role == "kv"
    assert plan.roles[4].kv_bytes == 5 * GB
    assert plan.roles[4].weight_bytes is None, "the draft model is not here"
    assert plan.block is not None
    assert (plan.block.tokens, plan.block.actual_kb) == (16, 1024)
    assert [(rung.engine, rung.available, rung.note) for rung in plan.ladder[1:]] == [
        ("nixl", True, "nixl 1.5.1"),
        ("ucx", False, "the package ucxx is not installed"),
        ("nccl", False, "the package torch is not installed"),
    ]


def test_without_prefill_replicas_one_role_does_both_and_no_pages_move() -> None:
    plan = make_plan(manifest("deployment: {replicas: {prefill: 0, decode: 2}}"), LAPTOP, SMOLLM2)
    assert [role.role for role in plan.roles] == ["nats", "gateway", "router", "both"]
    assert [rung.engine for rung in plan.ladder] == ["none"]


def test_a_missing_library_is_the_reason_of_its_rung() -> None:
    rung = make_plan(manifest(), TWO_GPUS, SMOLLM2).ladder[1]
    assert (rung.available, rung.note) == (False, "the package nixl is not installed")


def test_options_of_transfer_engines_show_in_the_plan() -> None:
    options = "nixl: {backend_policy: ucx}, ucx: {rdma: false}, nccl: {p2p: false}"
    text = f"transfer: {{engine_order: [nixl, ucx, nccl], {options}}}"
    libraries = {"nixl": "1", "ucxx": "2", "torch": "3"}
    bare = make_plan(manifest(text), replace(LAPTOP, libraries=libraries), SMOLLM2)
    assert [rung.note for rung in bare.ladder[1:]] == [
        "nixl 1, backend ucx only",
        "ucxx 2, RDMA forbidden",
        "torch 3, gloo: no GPU here",
    ]
    plain = make_plan(manifest("transfer: {engine_order: [ucx]}"), replace(LAPTOP, libraries=libraries), SMOLLM2)
    assert plain.ladder[1].note == "ucxx 2, no RDMA device here: TCP, shared memory"
    apart = make_plan(manifest("transfer: {same_host: false}"), replace(LAPTOP, libraries=libraries), SMOLLM2)
    assert [rung.engine for rung in apart.ladder] == ["nixl"]
    there = make_plan(manifest(text), replace(TWO_GPUS, libraries=libraries, rdma=("mlx5_0",)), SMOLLM2)
    assert there.ladder[3].note == "torch 3, without copies between GPUs"


_GPUS = "deployment: {resources: {prefill_gpu: 1, decode_gpu: 1}}"


@pytest.mark.parametrize(
    ("spec", "primary", "machine", "words"),
    [
        ("engine: {kv_space_gb: 20}", "id: m", LAPTOP, "GB of memory needed, 24.0 GB here"),
        ("engine: {kv_space_gb: 0.01}", "id: m", LAPTOP, "one request of the full length needs 64"),
        ("", "id: m, max_model_len: 9000", LAPTOP, "more than the model was made for, 8192"),
        (_GPUS, "id: m", LAPTOP, "fewer GPUs than asked for: 2 asked for, 0 here: the engines run on the CPU"),
        (_GPUS, "id: m, tensor_parallel: 2", TWO_GPUS, "fewer GPUs than asked for: 4 asked for, 2 here"),
        (f"{_GPUS}, engine: {{kv_space_gb: 150}}", "id: m", TWO_GPUS, "on each GPU needed"),
        ("deployment: {replicas: {prefill: 2}}", "id: m", LAPTOP, "3 engine threads share 2 cores"),
        ("deployment: {resources: {prefill_gpu: 2, decode_gpu: 1}}", "id: m", TWO_GPUS, "uses 1"),
        ("", "id: m, dtype: bf16", replace(LAPTOP, avx512=False), "models.primary.dtype: bf16"),
        ("kv_cache: {hbm_dtype: fp8}", "id: m", replace(LAPTOP, avx512=False), "fp8 needs AVX-512"),
    ],
)
def test_what_will_not_fit_is_a_warning(spec: str, primary: str, machine: Machine, words: str) -> None:
    assert any(words in warning for warning in make_plan(manifest(spec, primary), machine, SMOLLM2).warnings)


OLD_LAPTOP, OLD_HOST = replace(LAPTOP, avx512=False), replace(TWO_GPUS, avx512=False)


@pytest.mark.parametrize(
    ("primary", "spec", "machine", "dtype"),
    [
        ("id: m", "", LAPTOP, "auto"),
        ("id: m", "", OLD_LAPTOP, "fp32"),
        ("id: m, dtype: bf16", "", OLD_LAPTOP, "bf16"),
        ("id: m", "kv_cache: {hbm_dtype: bf16}", OLD_LAPTOP, "auto"),
        ("id: m", "engine: {kind: simulated}", OLD_LAPTOP, "auto"),
        (
            "id: m",
            "deployment: {resources: {prefill_gpu: 1, decode_gpu: 1}}",
            OLD_HOST,
            "auto",
        ),
    ],
)
def test_auto_is_fp32_where_the_engines_run_on_a_cpu_that_is_slow_in_bf16(
    primary: str, spec: str, machine: Machine, dtype: str
) -> None:
    assert with_dtype(manifest(spec, primary), machine).spec.models.primary.dtype == dtype


def test_the_plan_says_why_it_is_fp32_and_sizes_follow() -> None:
    fast, slow = (make_plan(load(SHIPPED / "local.yaml"), machine, SMOLLM2) for machine in (LAPTOP, OLD_LAPTOP))
    assert fast.model == "smollm2-135m, auto"
    assert slow.model == "smollm2-135m, fp32 as this CPU has no fast bf16"
    assert fast.pages is not None
    assert slow.pages == fast.pages // 2


@pytest.mark.parametrize(
    ("cpuinfo", "found"),
    [
        ("flags\t\t: fpu avx avx2 fma\n", False),
        ("flags\t\t: fpu avx2 avx512f avx512bw\n", True),
        ("Features\t: fp asimd\n", True),
        ("", True),
    ],
)
def test_avx_512_shows_in_the_flags_of_an_x86_cpu(cpuinfo: str, found: bool) -> None:
    assert has_avx512(cpuinfo) is found


def test_a_model_that_is_not_here_leaves_its_sizes_unknown() -> None:
    plan = make_plan(manifest(), LAPTOP)
    assert (plan.block, plan.pages, plan.memory_bytes) == (None, None, None)
    assert "not on this machine yet" in plan.warnings[0]


def test_gpus_are_read_from_the_listing_of_nvidia_smi() -> None:
    assert parse_gpus("NVIDIA H200, 143771\nA, B, 5\n") == (
        Gpu("NVIDIA H200", 143771 * 2**20),
        Gpu("A, B", 5 * 2**20),
    )
    with pytest.raises(ValueError, match=r"."):
        parse_gpus("No devices were found")


def test_this_machine_can_be_probed() -> None:
    machine = probe_machine()
    assert machine.cores >= 1
    assert machine.memory_bytes > GB // 4


def test_pipeline_parallelism_without_gpus_is_warned_of() -> None:
    made = manifest(primary="id: m, pipeline_parallel: 2")
    assert any("pipeline_parallel 2 needs GPUs" in warning for warning in make_plan(made, LAPTOP).warnings)
