"""Executors for engine cores in child processes: as vLLM's own, but they die with the process that started them.

vLLM's children outlive a parent that is killed. The executor is the first of our code that runs in such a child.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import signal
import threading
from typing import TYPE_CHECKING

from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from llmserve.workers.engine.base import EngineError
from llmserve.workers.engine.vllm_config import GPUS

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.executor import Executor


def die_with_parent() -> None:
    """Kill this process as soon as the one that started it is gone."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def leave_quickly() -> None:
    """When this process ends, do not look for garbage first: with vLLM's objects that takes seconds."""
    if multiprocessing.parent_process() is not None:
        atexit.register(gc.freeze)


def take_gpus(config: VllmConfig) -> None:
    """Let this process, and the ranks that it will start, see this engine's GPUs only; before CUDA is initialized."""
    gpus = config.additional_config.get(GPUS)
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus


class GuardedUniProcExecutor(UniProcExecutor):  # type: ignore[misc]  # vLLM is untyped
    """One rank, in the engine core's process."""

    def _init_executor(self) -> None:
        die_with_parent()
        leave_quickly()
        take_gpus(self.vllm_config)
        super()._init_executor()


class GuardedMultiprocExecutor(MultiprocExecutor):  # type: ignore[misc]  # vLLM is untyped
    """Several ranks, in processes that vLLM ends when the engine core's is gone."""

    def _init_executor(self) -> None:
        die_with_parent()
        leave_quickly()
        take_gpus(self.vllm_config)
        super()._init_executor()


def guarded(executor: type[Executor]) -> type[Executor]:
    """The guarded class for one of vLLM's. Raises ``EngineError`` for others (Ray)."""
    kinds: dict[type[Executor], type[Executor]] = {
        UniProcExecutor: GuardedUniProcExecutor,
        MultiprocExecutor: GuardedMultiprocExecutor,
    }
    try:
        return kinds[executor]
    except KeyError:
        raise EngineError(f"executor {executor.__name__} is not supported: ranks must be on one host") from None
