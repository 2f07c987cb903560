"""Threads whose work can wait."""

from __future__ import annotations

import os
import threading


def yield_to_the_engine() -> None:
    """Lower the calling thread's priority."""
    # Linux keeps priorities by thread: what is written behind must not slow down what is computed.
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
