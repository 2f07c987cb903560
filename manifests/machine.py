"""What the machine offers: cores, memory, GPUs, libraries."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

_LIBRARIES = {"nixl": ("nixl",), "ucxx": ("ucxx", "ucxx-cu13", "ucxx-cu12"), "torch": ("torch",)}
"""Module, and the distributions that may bring it."""
_SMI_TIMEOUT_S = 10.0
_RDMA = Path("/sys/class/infiniband")
_CPU = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU."""

    name: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine as far as a plan depends on it."""

    cores: int
    memory_bytes: int
    """All of it, not what is free."""
    gpus: tuple[Gpu, ...] = ()
    libraries: Mapping[str, str] = field(default_factory=dict)
    """Version of each library that is installed; of ``nixl``, ``ucxx`` and ``torch``."""
    rdma: tuple[str, ...] = ()
    """Names of RDMA devices."""
    gpu_note: str = ""
    """Why the GPUs could not be listed, if they could not."""
    avx512: bool = True
    """Whether the CPU has AVX-512; taken for granted where it is not x86."""


def probe_machine() -> Machine:
    """This machine."""
    gpus, note = _gpus()
    return Machine(
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpus=gpus,
        libraries={name: version for name in _LIBRARIES if (version := _version(name))},
        rdma=_rdma_devices(),
        gpu_note=note,
        avx512=has_avx512(_CPU.read_text()) if _CPU.is_file() else True,
    )


def parse_gpus(listing: str) -> tuple[Gpu, ...]:
    """``nvidia-smi``'s CSV of name and memory in MiB. Raises ``ValueError`` on anything else."""
    lines = [line.rsplit(",", 1) for line in listing.splitlines() if line.strip()]
    return tuple(Gpu(name.strip(), int(mebibytes) * 2**20) for name, mebibytes in lines)


def has_avx512(cpuinfo: str) -> bool:
    """Whether a CPU that ``/proc/cpuinfo`` describes so has it, or is not x86."""
    flags = next((line for line in cpuinfo.splitlines() if line.startswith("flags")), None)
    return flags is None or "avx512f" in flags.split()


def _gpus() -> tuple[tuple[Gpu, ...], str]:
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=_SMI_TIMEOUT_S, check=True)
        return parse_gpus(answer.stdout), ""
    except FileNotFoundError:
        return (), ""
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return (), f"nvidia-smi: {' '.join(str(error).split())}"


def _rdma_devices() -> tuple[str, ...]:
    return tuple(sorted(device.name for device in _RDMA.iterdir())) if _RDMA.is_dir() else ()


def _version(module: str) -> str:
    """Version of an installed library, without importing it: some take seconds; empty if it is not there."""
    if importlib.util.find_spec(module) is None:
        return ""
    for distribution in _LIBRARIES[module]:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "of unknown version"
