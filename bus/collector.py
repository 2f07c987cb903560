"""The garbage collector of a process that serves."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def loading(allocations: int) -> Iterator[None]:
    """All that a server loads before it serves, without looking for garbage: to load vLLM takes a sixth less time.
    Then ``rest_collector(allocations)``, unless it ends by an exception."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
    rest_collector(allocations)


def rest_collector(allocations: int) -> None:
    """Call it when all is loaded: what is there now stays, and is not looked through for garbage again.

    What comes after is freed when nobody refers to it any more, as ever; for what refers to itself the process is
    looked through each ``allocations`` objects, and for what has grown old a hundredth as often. A server makes and
    drops so many objects a second, and keeps so many of them for a while, that the default of 700 costs much more.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(allocations, 20, 50)
