"""The transfer engines that a manifest allows, in their order, and which of them this machine has."""

from __future__ import annotations

from dataclasses import dataclass

from llmserve.manifests.machine import Machine
from llmserve.manifests.schema import Manifest, Spec
from llmserve.manifests.sizes import prefill_engines


@dataclass(frozen=True, slots=True)
class Rung:
    """One transfer engine of the ladder."""

    engine: str
    available: bool
    note: str


def plan_ladder(manifest: Manifest, machine: Machine) -> tuple[Rung, ...]:
    spec = manifest.spec
    if not prefill_engines(manifest):
        return (Rung("none", True, "one engine prefills and decodes: no pages move"),)
    if spec.engine.kind == "simulated":
        simulated = spec.engine.simulated
        rate = f"{simulated.transfer_gbps:g} Gbit/s" if simulated is not None else "the default rate"
        return (Rung("simulated", True, f"takes the time that {rate} would"),)
    same_host = (Rung("same_host", True, "first where both ends are on one host"),) if spec.transfer.same_host else ()
    return (*same_host, *(_rung(name, spec, machine) for name in spec.transfer.engine_order))


def _rung(name: str, spec: Spec, machine: Machine) -> Rung:
    library = {"nixl": "nixl", "ucx": "ucxx", "nccl": "torch"}[name]
    version = machine.libraries.get(library)
    if version is None:
        return Rung(name, False, f"the package {library} is not installed")
    return Rung(name, True, f"{library} {version}{_rung_note(name, spec, machine)}")


def _rung_note(name: str, spec: Spec, machine: Machine) -> str:
    transfer = spec.transfer
    if name == "nixl":
        return "" if transfer.nixl.backend_policy == "auto" else f", backend {transfer.nixl.backend_policy} only"
    if name == "ucx":
        forbidden = transfer.ucx is not None and not transfer.ucx.rdma
        return (
            ", RDMA forbidden" if forbidden else "" if machine.rdma else ", no RDMA device here: TCP, shared memory"
        )
    if not machine.gpus:
        return ", gloo: no GPU here"
    return ", without copies between GPUs" if transfer.nccl is not None and not transfer.nccl.p2p else ""
