"""Which GPUs each engine of ``llmserve up`` gets."""

from __future__ import annotations

import msgspec

from llmserve.manifests.gpus import engine_gpus, share_out, visible_gpus
from llmserve.manifests.machine import Gpu, Machine
from llmserve.manifests.schema import Manifest


def machine(gpus: int) -> Machine:
    return Machine(cores=8, memory_bytes=2**36, gpus=(Gpu("H100", 2**36),) * gpus)


def manifest(prefill: int, decode: int, tensor_parallel: int = 1, gpus: int = 1) -> Manifest:
    spec = {
        "models": {"primary": {"id": "m", "tensor_parallel": tensor_parallel}},
        "deployment": {
            "replicas": {"prefill": prefill, "decode": decode},
            "resources": {"prefill_gpu": gpus, "decode_gpu": gpus},
        },
    }
    return msgspec.convert({"metadata": {"name": "t"}, "spec": spec}, Manifest)


def test_every_engine_has_gpus_of_its_own_while_there_are_enough() -> None:
    assert engine_gpus(manifest(1, 2), machine(4), {}) == [("0",), ("1",), ("2",)]
    assert engine_gpus(manifest(1, 1, tensor_parallel=2), machine(4), {}) == [("0", "1"), ("2", "3")]


def test_further_engines_share_gpus_from_the_first_on() -> None:
    assert engine_gpus(manifest(1, 2), machine(2), {}) == [("0",), ("1",), ("0",)]
    assert engine_gpus(manifest(1, 1), machine(1), {}) == [("0",), ("0",)]


def test_an_engine_that_wants_more_than_there_are_gets_all() -> None:
    assert share_out(["0", "1"], [4]) == [("0", "1")]


def test_only_what_cuda_shows_is_shared_out() -> None:
    assert visible_gpus(machine(8), {"CUDA_VISIBLE_DEVICES": "5, GPU-abc"}) == ("5", "GPU-abc")
    assert engine_gpus(manifest(1, 1), machine(8), {"CUDA_VISIBLE_DEVICES": "6,7"}) == [("6",), ("7",)]


def test_engines_on_cpus_get_none() -> None:
    assert engine_gpus(manifest(1, 1, gpus=0), machine(4), {}) == [(), ()]
    assert engine_gpus(manifest(0, 2), machine(0), {}) == [(), ()]
