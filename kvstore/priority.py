"""Threads beside an engine's, which must not slow it down."""

from __future__ import annotations

import os
import threading


def yield_to_the_engine() -> None:
    """Lower the calling thread's priority."""
    # Linux keeps priorities by thread: what is written behind must not slow down what is computed.
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def keep_to_one_core() -> None:
    """Have torch work on the calling thread alone, without OpenMP's threads, which the engine needs."""
    import torch

    # OpenMP keeps the number by thread: those that have used torch before, as this one has by asking, keep theirs.
    # Not ``torch.set_num_threads``, which vLLM's CPU worker replaces by a function that does nothing.
    number = torch.get_num_threads()
    torch._C.set_num_threads(1)
    # It is now what threads to come begin with, an engine's among them. Set by a thread that ends it is theirs again.
    setting = threading.Thread(target=torch._C.set_num_threads, args=(number,))
    setting.start()
    setting.join()


def yield_on_one_core() -> None:
    """Both."""
    yield_to_the_engine()
    keep_to_one_core()
