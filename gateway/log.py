"""Log records of the gateway: JSON lines with the request they belong to."""

from __future__ import annotations

import logging
import time

import msgspec

from llmserve.gateway.caller import current_caller

_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


class BindCaller(logging.Filter):
    """Adds ``request_id`` and ``tenant`` to records written while a request is served."""

    def filter(self, record: logging.LogRecord) -> bool:
        caller = current_caller.get()
        if caller is not None:
            record.__dict__.setdefault("request_id", caller.request_id)
            record.__dict__.setdefault("tenant", caller.tenant)
        return True


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and everything passed as ``extra``."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update((name, value) for name, value in record.__dict__.items() if name not in _STANDARD)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line, enc_hook=str).decode()


def log_to_stderr(level: int = logging.INFO) -> None:
    """Have the process log JSON lines to its standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    handler.addFilter(BindCaller())
    logging.basicConfig(level=level, handlers=[handler], force=True)


class _Expected(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        from vllm.exceptions import GracefulHTTPError

        return not (record.exc_info and isinstance(record.exc_info[1], GracefulHTTPError))


def quiet_expected_failures() -> None:
    """vLLM writes a traceback for every streamed request that is refused; the gateway logs those in one line."""
    filters = _Expected()
    for name in ("chat_completion", "completion", "responses"):
        logger = logging.getLogger(f"vllm.entrypoints.openai.{name}.serving")
        if not any(isinstance(known, _Expected) for known in logger.filters):
            logger.addFilter(filters)
