"""Engine cores on CPUs are forked from a process that has loaded vLLM and done nothing else.

vLLM starts its children by "spawn", which loads everything again in each of them, about 7 s of a core, or by "fork",
which copies this process with its threads and locks. A fork server has neither fault: one more process loads vLLM
once, while this one does, and the children share its memory.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import multiprocessing
import os
import signal
from collections.abc import Sequence
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess, SpawnContext

_LOADED = ("llmserve.workers.engine.vllm_loaded",)
_READ_WHEN_LOADED = (
    "OMP_NUM_THREADS",
    "GOMP_SPINCOUNT",
    "TORCH_COMPILE_DISABLE",
    "VLLM_LOGGING_LEVEL",
    "HF_HUB_OFFLINE",
)


_PR_SET_PDEATHSIG = 1


class EngineProcess(ForkServerProcess):
    """A child with the environment that this process has when it is started, not the fork server's.

    It dies with the fork server, without which this process would take it for dead.
    """

    _environment: dict[str, str]

    def start(self) -> None:
        self._environment = dict(os.environ)
        super().start()

    def run(self) -> None:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        gc.enable()
        _become(self._environment)
        super().run()


class EngineContext(ForkServerContext):
    """What vLLM starts its engine cores with."""

    Process = EngineProcess

    def __init__(self, loaded: Sequence[str] = _LOADED) -> None:
        super().__init__()
        self.set_forkserver_preload(list(loaded))
        self._environment = _read_when_loaded()
        forkserver.ensure_running()
        atexit.register(_end_fork_server)

    def fits(self) -> bool:
        """Whether a child may come from the server: what its libraries read when they were loaded still holds."""
        return self._environment == _read_when_loaded()


@cache
def engine_context() -> EngineContext:
    """The only one of this process, as it can have only one fork server; returns before vLLM is loaded there.

    The engines' environment must be set.
    """
    return EngineContext()


def fork_engines() -> None:
    """Let vLLM start the engine cores of this process from the fork server."""
    from vllm.v1.engine import utils

    engine_context()
    utils.get_mp_context = _context


def _context() -> EngineContext | SpawnContext:
    context = engine_context()
    return context if context.fits() else multiprocessing.get_context("spawn")


def _end_fork_server() -> None:
    # By itself it would end with this process too, but only after it has taken down for seconds what it has loaded.
    server = forkserver._forkserver
    pid: int | None = getattr(server, "_forkserver_pid", None)
    if pid is not None:
        os.kill(pid, signal.SIGKILL)


def _become(environment: dict[str, str]) -> None:
    # Not cleared first: setproctitle, which names the child, would not find the place of the name any more.
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    for name, value in environment.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


def _read_when_loaded() -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in _READ_WHEN_LOADED}
