"""uvicorn's HTTP protocol with bounds on what a connection may cost: header bytes, header time, unread output."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from llmserve.gateway.errors import error_body
from llmserve.gateway.http_protocol import WritingProtocol
from llmserve.gateway.metrics import GatewayMetrics
from llmserve.manifests.schema import Gateway

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HttpBounds:
    """What one connection may cost."""

    header_bytes: int
    header_timeout_s: float
    write_timeout_s: float

    @classmethod
    def from_manifest(cls, gateway: Gateway) -> HttpBounds:
        return cls(gateway.max_header_kb * 1024, gateway.header_timeout_s, gateway.write_timeout_s)


class _Refused(Exception):
    """Raised inside a callback of the parser to stop it."""


class BoundedProtocol(WritingProtocol):
    """``bounds`` and ``metrics`` are of the class that ``bounded_protocol`` makes."""

    bounds: HttpBounds
    metrics: GatewayMetrics

    _in_headers = False
    _received_bytes = 0
    _refusal: tuple[int, str, str] | None = None
    _header_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._header_timer = _cancel(self._header_timer)
        self._write_timer = _cancel(self._write_timer)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        begun = self._in_headers
        super().data_received(data)
        # The parser keeps an unfinished header for as long as it grows. What came with its first bytes, such as the
        # end of a body, is not counted.
        if not (begun and self._in_headers) or self.transport.is_closing():
            return
        self._received_bytes += len(data)
        if self._received_bytes > self.bounds.header_bytes:
            self._refuse_headers()
            self.send_400_response("")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_headers = True
        if self._header_timer is None:
            self._expect_headers()

    def on_headers_complete(self) -> None:
        self._in_headers = False
        self._received_bytes = 0
        self._header_timer = _cancel(self._header_timer)
        size_bytes = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size_bytes > self.bounds.header_bytes:
            self._refuse_headers()
            raise _Refused
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        status, kind, message = self._refusal or (400, "BadRequestError", msg)
        self.metrics.connections_refused.labels(str(status)).inc()
        body = error_body(status, kind, message)
        head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.bounds.write_timeout_s, self._write_timed_out)

    def resume_writing(self) -> None:
        self._write_timer = _cancel(self._write_timer)
        super().resume_writing()

    def _expect_headers(self) -> None:
        self._header_timer = self.loop.call_later(self.bounds.header_timeout_s, self._headers_timed_out)

    def _refuse_headers(self) -> None:
        self._refusal = (431, "RequestHeadersTooLargeError", f"Headers exceed {self.bounds.header_bytes} bytes")

    def _headers_timed_out(self) -> None:
        self._header_timer = None
        if self.transport.is_closing():
            return
        self._refusal = (408, "RequestTimeoutError", f"No headers within {self.bounds.header_timeout_s:g} s")
        self.send_400_response("")

    def _write_timed_out(self) -> None:
        self._write_timer = None
        self.metrics.slow_clients.inc()
        log.warning("a client reads nothing for %g s: disconnected", self.bounds.write_timeout_s)
        self.transport.abort()


def bounded_protocol(bounds: HttpBounds, metrics: GatewayMetrics) -> type[BoundedProtocol]:
    """The protocol class of one gateway."""
    return type("BoundedProtocol", (BoundedProtocol,), {"bounds": bounds, "metrics": metrics})


def _cancel(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    if timer is not None:
        timer.cancel()
    return None
