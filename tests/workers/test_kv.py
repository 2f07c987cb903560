"""The kv role, and what a sweep of shared memory takes and leaves."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from llmserve.workers.engine.shm import sweep
from llmserve.workers.kv import KvManager


@pytest.fixture
def shm(tmp_path: Path) -> Path:
    """A folder of four old files, 100 bytes each, of which a process maps psm_b."""
    folder = tmp_path / "shm"
    folder.mkdir()
    for name in ("psm_a", "psm_b", "vllm_offload_x.mmap", "somebody-elses"):
        (folder / name).write_bytes(b"x" * 100)
    (tmp_path / "proc" / "1" / "fd").mkdir(parents=True)
    (tmp_path / "proc" / "1" / "maps").write_text(f"7f00-7f01 rw-s 00000000 00:19 5 {folder}/psm_b\n")
    return folder


def when_old(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 1000)


def test_a_sweep_removes_what_dead_engines_left(shm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    when_old(monkeypatch)
    assert sweep(shm, tmp_path / "proc") == 200
    assert sorted(path.name for path in shm.iterdir()) == ["psm_b", "somebody-elses"]


def test_a_sweep_keeps_young_files_which_an_engine_may_be_about_to_map(shm: Path, tmp_path: Path) -> None:
    assert sweep(shm, tmp_path / "proc") == 0
    assert len(os.listdir(shm)) == 4


async def test_the_manager_sweeps_again_and_again_and_counts_the_bytes() -> None:
    registry = CollectorRegistry()
    sweeps = iter([100, 50, 0, 0, 0, 0, 0, 0])
    running = asyncio.create_task(KvManager(registry, every_s=0.001, sweep=lambda: next(sweeps)).run())
    while registry.get_sample_value("llmserve_shared_memory_reclaimed_bytes_total") != 150:
        await asyncio.sleep(0.001)
    running.cancel()
