"""The folder for the sockets of vLLM's processes."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmserve.workers.engine import sockets

_OWNER = (
    "import sys, pathlib; from llmserve.workers.engine.sockets import make; print(make(pathlib.Path(sys.argv[1])))"
)


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of ``sweep`` is ahead."""
    now = time.time()
    monkeypatch.setattr("llmserve.workers.engine.sockets.time.time", lambda: now + 100)


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """The folder of a process that was killed."""
    code = f"{_OWNER}; sys.stdout.flush(); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        folder = Path(owner.stdout.readline().strip())
        owner.kill()
    (folder / "socket").touch()
    return folder


@pytest.mark.usefixtures("later")
def test_a_killed_processs_folder_is_deleted_with_what_is_in_it(killed: Path, tmp_path: Path) -> None:
    sockets.sweep(tmp_path)
    assert not killed.exists()


@pytest.mark.usefixtures("later")
def test_a_living_processs_folder_stays(tmp_path: Path) -> None:
    folder = sockets.make(tmp_path)
    sockets.sweep(tmp_path)
    assert folder.is_dir()


def test_a_new_folder_stays_as_its_process_may_not_have_locked_it_yet(killed: Path, tmp_path: Path) -> None:
    sockets.sweep(tmp_path)
    assert killed.is_dir()


@pytest.mark.usefixtures("later")
def test_folders_of_others_stay(tmp_path: Path) -> None:
    other = tmp_path / "llmserve-kv-0123"
    other.mkdir()
    sockets.sweep(tmp_path)
    assert other.is_dir()
