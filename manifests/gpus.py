"""Which GPUs each engine of one process uses."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from llmserve.manifests.machine import Machine
from llmserve.manifests.schema import Manifest
from llmserve.manifests.sizes import decode_engines, device, engine_ranks, prefill_engines


def engine_gpus(manifest: Manifest, machine: Machine, environ: Mapping[str, str]) -> list[tuple[str, ...]]:
    """Of each engine that ``llmserve up`` starts, prefill engines first; empty tuples where engines run on CPUs."""
    resources, ranks = manifest.spec.deployment.resources, engine_ranks(manifest)
    wanted = [max(resources.prefill_gpu, ranks)] * prefill_engines(manifest)
    wanted += [max(resources.decode_gpu, ranks)] * decode_engines(manifest)
    if device(manifest, machine) == "cpu":
        return [()] * len(wanted)
    return share_out(visible_gpus(machine, environ), wanted)


def visible_gpus(machine: Machine, environ: Mapping[str, str]) -> tuple[str, ...]:
    """Ids of the GPUs that CUDA shows to this process."""
    listed = environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return tuple(str(index) for index in range(len(machine.gpus)))
    return tuple(name.strip() for name in listed.split(",") if name.strip())


def share_out(gpus: Sequence[str], wanted: Sequence[int]) -> list[tuple[str, ...]]:
    """So many GPUs for each engine, in turn. When all are taken, further engines share them from the first on."""
    if not gpus:
        return [()] * len(wanted)
    turn = itertools.cycle(gpus)
    return [tuple(itertools.islice(turn, min(number, len(gpus)))) for number in wanted]
