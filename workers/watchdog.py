"""The end of a worker's process whose event loop stands still.

An engine that hangs in a thread of this process may hold the interpreter's lock: then nothing in it runs any more,
and nobody in it could tell. The timer that ends it needs no lock.
"""

from __future__ import annotations

import asyncio
import faulthandler
from collections.abc import Iterator
from contextlib import contextmanager

_LOOKS = 4
"""In the time after which the process ends."""
_LOOK_S = 1.0
"""Between two looks at most."""


@contextmanager
def ends_if_it_stands_still(still_s: float) -> Iterator[None]:
    """End this process with status 1 and all threads' stacks on stderr if the running event loop takes no turn for
    ``still_s``, a time in which the process was stopped included."""
    looking = asyncio.get_running_loop().create_task(_look(still_s))
    try:
        yield
    finally:
        looking.cancel()
        faulthandler.cancel_dump_traceback_later()


async def _look(still_s: float) -> None:
    while True:
        faulthandler.dump_traceback_later(still_s, exit=True)
        await asyncio.sleep(min(_LOOK_S, still_s / _LOOKS))
