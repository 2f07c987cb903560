"""The kv role's sweep of shared memory."""

from __future__ import annotations

import os
from pathlib import Path

from llmserve.workers.kv import mapped_segments, sweep


def folders(tmp_path: Path) -> tuple[Path, Path]:
    shm, proc = tmp_path / "shm", tmp_path / "proc"
    shm.mkdir()
    (proc / "1" / "fd").mkdir(parents=True)
    (proc / "1" / "maps").write_text("7f00-7f01 rw-s 00000000 00:19 5 /dev/shm/psm_0000000b\n")
    for name in ("psm_0000000a", "psm_0000000b", "vllm_offload_x.mmap", "somebody-elses"):
        (shm / name).write_bytes(b"x" * 100)
    return shm, proc


def test_it_removes_segments_of_engines_that_no_process_maps(tmp_path: Path) -> None:
    shm, proc = folders(tmp_path)
    assert sweep(0, os.stat(shm).st_mtime + 1000, shm, proc) == 200
    assert sorted(path.name for path in shm.iterdir()) == ["psm_0000000b", "somebody-elses"]


def test_it_keeps_young_segments_which_an_engine_may_be_about_to_map(tmp_path: Path) -> None:
    shm, proc = folders(tmp_path)
    assert sweep(60, os.stat(shm).st_mtime + 30, shm, proc) == 0
    assert len(list(shm.iterdir())) == 4


def test_an_open_descriptor_counts_as_use(tmp_path: Path) -> None:
    shm, proc = folders(tmp_path)
    (proc / "1" / "fd" / "3").symlink_to("/dev/shm/psm_0000000a")
    assert mapped_segments(proc) == {"psm_0000000a", "psm_0000000b"}


def test_the_processes_of_this_machine_can_be_read() -> None:
    assert isinstance(mapped_segments(), set)
