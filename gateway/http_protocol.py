"""uvicorn's HTTP/1.1 protocol with ways to write a chunk of a response, and to hear that the client goes, that need
no task.

A response that has begun may be continued through ``scope["extensions"]["llmserve.write"]``: a function that takes
the bytes of one chunk and returns whether it has written them. It has not if the client does not keep up, is gone, or
the response does not stand where a chunk may follow: then ``send`` is the way, which waits or drops.

``scope["extensions"]["llmserve.watch"]`` takes a function that is called when the client goes, at once if it has, and
None when nobody wants to know any more. It is for requests whose body was read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias, cast

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

WRITE = "llmserve.write"
Write: TypeAlias = Callable[[bytes], bool]
WATCH = "llmserve.watch"
Watch: TypeAlias = Callable[[Callable[[], None] | None], None]


class WritingProtocol(HttpToolsProtocol):
    """For ``uvicorn.Config(http=...)``."""

    _tell: Callable[[], None] | None = None
    """Who wants to know when the client goes; one request of a connection is answered at a time."""
    _lost = False

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._lost = True
        if self._tell is not None:
            self._tell()

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        cycle = self.cycle
        if cycle is not None and cycle.scope is self.scope:
            # The application's task is made by now, but runs later.
            extensions = cast(Scope, self.scope).setdefault("extensions", {})
            extensions[WRITE], extensions[WATCH] = _writer(cycle), self._watch

    def _watch(self, tell: Callable[[], None] | None) -> None:
        self._tell = tell
        if tell is None:
            return
        if self._lost:
            tell()
        else:
            # Behind a large body it may stand still, and would not see the end.
            self.flow.resume_reading()


def writer_of(scope: Scope) -> Write | None:
    """The function for the response to ``scope``, None if the server has none."""
    write: Write | None = scope.get("extensions", {}).get(WRITE)
    return write


def watch_of(scope: Scope) -> Watch | None:
    """What tells when the client of ``scope`` goes, None if the server has nothing that does."""
    watch: Watch | None = scope.get("extensions", {}).get(WATCH)
    return watch


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
