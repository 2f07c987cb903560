"""Log records of the gateway: bound to the request they belong to, and fewer of vLLM's."""

from __future__ import annotations

import logging

from llmserve.gateway.caller import current_caller


class BindCaller(logging.Filter):
    """Adds ``request_id`` and ``tenant`` to records written while a request is served."""

    def filter(self, record: logging.LogRecord) -> bool:
        caller = current_caller.get()
        if caller is not None:
            record.__dict__.setdefault("request_id", caller.request_id)
            record.__dict__.setdefault("tenant", caller.tenant)
        return True


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
