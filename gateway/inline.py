"""Small work is done where it comes up: a change of threads costs more than a chat template or a short prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextvars import ContextVar
from typing import ParamSpec, TypeVar, cast

INLINE_BYTES = 4096
"""Longest request body whose template and tokenization, below a millisecond, may hold up the event loop."""

small_request: ContextVar[bool] = ContextVar("llmserve_small_request", default=False)
"""Whether the work at hand belongs to a request of at most ``INLINE_BYTES``."""

P = ParamSpec("P")
T = TypeVar("T")


class InlineExecutor(Executor):
    """Runs the work of small requests at once, and everything else on ``pool``."""

    def __init__(self, pool: Executor) -> None:
        self._pool = pool

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        if not small_request.get():
            return self._pool.submit(fn, *args, **kwargs)
        # The loop's own: ``run_in_executor`` passes it on as it is, where a thread's future would wake the loop
        # through a file, two turns of it for each piece of work.
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return cast("Future[T]", future)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._pool.shutdown(wait, cancel_futures=cancel_futures)
