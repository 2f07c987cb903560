"""Shared memory that killed engines left."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llmserve.workers.engine.shm import sweep


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "psm_1234"
    path.write_bytes(b"x" * 100)
    return path


def age(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    import time

    now = time.time()
    monkeypatch.setattr("llmserve.workers.engine.shm.time.time", lambda: now + seconds)


def test_what_nobody_uses_is_freed(old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    age(monkeypatch, 100)
    assert sweep(tmp_path) == 100
    assert not old.exists()


def test_a_file_that_a_process_holds_open_stays(old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    age(monkeypatch, 100)
    with old.open("rb"):
        assert sweep(tmp_path) == 0
    assert old.exists()


def test_a_new_file_stays(old: Path, tmp_path: Path) -> None:
    assert sweep(tmp_path) == 0
    assert old.exists()


def test_files_of_others_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "something").write_bytes(b"x")
    age(monkeypatch, 100)
    assert sweep(tmp_path) == 0
    assert (tmp_path / "something").exists()
    assert os.getuid() == (tmp_path / "something").stat().st_uid


def test_a_file_that_a_process_maps_stays(old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proc = tmp_path / "proc" / "77"
    (proc / "fd").mkdir(parents=True)
    (proc / "maps").write_text(f"7f00-7f01 rw-s 00000000 00:19 42                         {old}\n")
    age(monkeypatch, 100)
    assert sweep(tmp_path, tmp_path / "proc") == 0
    assert old.exists()
