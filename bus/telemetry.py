"""What every role tells the outside: log lines with fields, and metrics on a port of their own."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Callable

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from llmserve.bus.base import BusError

_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}
_HEAD_TIMEOUT_S = 5.0


def _fields(record: logging.LogRecord) -> dict[str, object]:
    return {name: value for name, value in record.__dict__.items() if name not in _STANDARD}


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and everything passed as ``extra``."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line, enc_hook=str).decode()


class TextLines(logging.Formatter):
    """For a person at a terminal: time, level, logger, message, ``key=value``."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created)) + f".{int(record.msecs):03d}"
        pairs = "".join(f" {name}={value}" for name, value in _fields(record).items())
        line = f"{clock} {record.levelname.lower():<7} {record.name}: {record.getMessage()}{pairs}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def configure_logging(level: int = logging.INFO, *, json: bool, filters: tuple[logging.Filter, ...] = ()) -> None:
    """Have the process write its log to standard error, one record a line."""
    # No line shows them, and each record would look them up.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if json else TextLines())
    for log_filter in filters:
        handler.addFilter(log_filter)
    logging.basicConfig(level=level, handlers=[handler], force=True)


class MetricsServer:
    """``/metrics`` of a registry and ``/health/live``, over plain HTTP on a port of their own.

    ``alive`` decides what ``/health/live`` answers: 200 while it is true, else 503.
    """

    def __init__(
        self, registry: CollectorRegistry, host: str, port: int, alive: Callable[[], bool] = lambda: True
    ) -> None:
        self._registry = registry
        self._host = host
        self._port = port
        self._alive = alive
        self._server: asyncio.Server | None = None

    @property
    def port(self) -> int:
        """The port in use, also if 0 was asked for."""
        if self._server is None:
            return self._port
        return int(self._server.sockets[0].getsockname()[1])

    @property
    def url(self) -> str:
        return f"http://{'127.0.0.1' if self._host == '0.0.0.0' else self._host}:{self.port}/metrics"

    async def start(self) -> None:
        """Listen. Raises ``BusError`` with one line if the port is taken."""
        try:
            self._server = await asyncio.start_server(self._serve, self._host, self._port)
        except OSError as error:
            raise BusError(f"metrics port {self._host}:{self._port}: {error.strerror or error}") from error

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_HEAD_TIMEOUT_S):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(self._answer(head.split(b" ", 2)[1].decode("latin-1")))
                await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, IndexError):
            return  # a client that does not speak HTTP, or left
        finally:
            writer.close()

    def _answer(self, path: str) -> bytes:
        kind = "text/plain; charset=utf-8"
        match path.partition("?")[0]:
            case "/metrics":
                status, kind, body = "200 OK", CONTENT_TYPE_LATEST, generate_latest(self._registry)
            case "/health/live":
                status, body = ("200 OK", b"ok\n") if self._alive() else ("503 Service Unavailable", b"not alive\n")
            case _:
                status, body = "404 Not Found", b"/metrics and /health/live are here\n"
        head = (
            f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        return head.encode() + body
