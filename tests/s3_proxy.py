"""A proxy in front of an S3 server that fails as it is told: down, slow, busy, or with credentials that expired."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

Fault = Literal["", "down", "slow", "busy", "expired", "cut", "stuck"]
"""``cut``: half of a body, then the end. ``stuck``: what is to be written never arrives whole."""

_SLOW_S = 3.0
_ANSWERS = {"busy": (503, "SlowDown"), "expired": (400, "ExpiredToken")}
_HOP = ("connection", "keep-alive", "transfer-encoding")


class FaultyS3:
    """``fault`` may be changed at any time; ``hit`` counts the requests that met one, by fault."""

    def __init__(self, upstream: str) -> None:
        self.fault: Fault = ""
        self.hit: dict[Fault, int] = {}
        self._upstream = urlsplit(upstream).netloc
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_request(self) -> None:
                fault = proxy.fault
                if fault == "stuck" and self.command == "PUT":
                    proxy.hit[fault] = proxy.hit.get(fault, 0) + 1
                    time.sleep(60)
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                if fault and fault != "stuck":
                    proxy.hit[fault] = proxy.hit.get(fault, 0) + 1
                    if fault == "down":
                        self.close_connection = True
                        return
                    if fault == "slow":
                        time.sleep(_SLOW_S)
                    if fault in _ANSWERS:
                        self._refuse(*_ANSWERS[fault])
                        return
                self._forward(body, cut=fault == "cut")

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_request

            def _refuse(self, status: int, code: str) -> None:
                answer = f"<Error><Code>{code}</Code><Message>m</Message></Error>".encode()
                self.send_response(status)
                self.send_header("content-type", "application/xml")
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer)

            def _forward(self, body: bytes, *, cut: bool) -> None:
                server = http.client.HTTPConnection(proxy._upstream, timeout=30)
                try:
                    server.request(self.command, self.path, body, dict(self.headers.items()))
                    answer = server.getresponse()
                    data = answer.read()
                finally:
                    server.close()
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in (*_HOP, "content-length"):
                        self.send_header(name, value)
                length = answer.headers["content-length"] if self.command == "HEAD" else len(data)
                self.send_header("content-length", str(length))
                self.end_headers()
                with suppress(BrokenPipeError, ConnectionResetError):
                    self.wfile.write(data[: len(data) // 2] if cut else data)
                self.close_connection = self.close_connection or cut

            def log_message(self, *arguments: object) -> None:
                """Silent."""

        return Handler


@contextmanager
def faulty_s3(upstream: str) -> Iterator[FaultyS3]:
    """A proxy before the server at ``upstream``."""
    proxy = FaultyS3(upstream)
    try:
        yield proxy
    finally:
        proxy.close()
