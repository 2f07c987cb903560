"""uvicorn's HTTP/1.1 protocol with a way to write a chunk of a response at once, without a task.

A response that has begun may be continued through ``scope["extensions"]["llmserve.write"]``: a function that takes
the bytes of one chunk and returns whether it has written them. It has not if the client does not keep up, is gone, or
the response does not stand where a chunk may follow: then ``send`` is the way, which waits or drops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias, cast

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

WRITE = "llmserve.write"
Write: TypeAlias = Callable[[bytes], bool]


class WritingProtocol(HttpToolsProtocol):
    """For ``uvicorn.Config(http=...)``."""

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        cycle = self.cycle
        if cycle is not None and cycle.scope is self.scope:
            # The application's task is made by now, but runs later.
            cast(Scope, self.scope).setdefault("extensions", {})[WRITE] = _writer(cycle)


def writer_of(scope: Scope) -> Write | None:
    """The function for the response to ``scope``, None if the server has none."""
    write: Write | None = scope.get("extensions", {}).get(WRITE)
    return write


def _writer(cycle: RequestResponseCycle) -> Write:
    flow, transport = cycle.flow, cycle.transport

    def write(data: bytes) -> bool:
        if flow.write_paused or cycle.disconnected or not cycle.response_started or cycle.response_complete:
            return False
        if not cycle.chunked_encoding:
            return False
        transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        return True

    return write
