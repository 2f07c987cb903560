"""Engine processes come from one that has vLLM loaded."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest

from llmserve.workers.engine.vllm_fork import engine_context
from tests.workers.engine_vllm.driver import Pair

pytestmark = [pytest.mark.vllm, pytest.mark.faults]
VARIABLE = "LLMSERVE_TEST_FORK"


def fork_server() -> psutil.Process:
    (server,) = (p for p in psutil.Process().children() if "multiprocessing.forkserver" in " ".join(p.cmdline()))
    return server


def tell(pipe: Connection) -> None:
    pipe.send(os.environ.get(VARIABLE))


def test_an_engine_process_is_forked_from_the_one_that_has_vllm_loaded(pair: Pair) -> None:
    assert "EngineCore" in " ".join(name for p in fork_server().children() for name in (p.name(), *p.cmdline()))


@pytest.mark.parametrize("value", ["one", "two"])
def test_a_child_has_the_environment_of_its_start(pair: Pair, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, value)
    context = engine_context()
    ours, theirs = context.Pipe()
    child = context.Process(target=tell, args=(theirs,))
    child.start()
    assert ours.poll(20)
    assert ours.recv() == value
    child.join()


def test_a_child_is_not_forked_where_libraries_would_have_been_loaded_otherwise(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert engine_context().fits()
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert not engine_context().fits()


def test_a_child_dies_with_the_fork_server_and_the_next_one_has_another(tmp_path: Path) -> None:
    script = """
        import time
        import psutil
        from llmserve.workers.engine.vllm_fork import EngineContext

        def live(pipe):
            pipe.send("here")
            time.sleep(600)

        if __name__ == "__main__":
            context = EngineContext(loaded=[])
            ours, theirs = context.Pipe()
            first = context.Process(target=live, args=(theirs,), daemon=True)
            first.start()
            ours.recv()
            child = psutil.Process(first.pid)
            child.parent().kill()
            print(psutil.wait_procs([child], timeout=10)[1], first.is_alive())
            second = context.Process(target=print, args=("second",))
            second.start()
            second.join()
    """
    path = tmp_path / "parent.py"
    path.write_text(textwrap.dedent(script))
    env = os.environ | {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    ran = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=60, env=env)
    assert ran.stdout.split("\n") == ["[] False", "second", ""], ran.stderr
