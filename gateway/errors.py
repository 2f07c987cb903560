"""Errors in OpenAI's shape."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from llmserve.gateway.caller import current_caller

if TYPE_CHECKING:
    from fastapi import FastAPI

log = logging.getLogger(__name__)

_KINDS = {
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    429: "RateLimitError",
}

_CODES = {401: "invalid_api_key", 413: "request_too_large", 429: "rate_limit_exceeded"}
"""Where OpenAI has a word; elsewhere the status, as vLLM does it."""

_GENERATES = "The model of this deployment generates text and does not support "
_NOT_SERVED = {
    "/v1/embeddings": _GENERATES + "embeddings",
    "/v1/moderations": _GENERATES + "moderations",
    "/v1/rerank": _GENERATES + "reranking",
    "/v1/images/generations": _GENERATES + "images",
    "/v1/audio/transcriptions": _GENERATES + "audio",
    "/v1/audio/speech": _GENERATES + "audio",
    "/v1/chat/completions/batch": "Not supported over the bus, use /v1/batches",
}
"""Paths that clients know and this server does not have."""


def error_body(status: int, kind: str, message: str, param: str | None = None) -> bytes:
    """The response's body, with the fields and types of vLLM's own errors."""
    return msgspec.json.encode(
        {"error": {"message": message, "type": kind, "param": param, "code": _CODES.get(status, status)}}
    )


def error_response(
    status: int, kind: str, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    response = JSONResponse(None, status, headers=dict(headers or {}))
    response.body = error_body(status, kind, message, param)
    response.headers["content-length"] = str(len(response.body))
    return response


def install_error_handlers(app: FastAPI) -> None:
    """Handlers for what vLLM's own leave in another shape, or tell too much about."""
    # vLLM handles FastAPI's subclass only, the router raises Starlette's.
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_exception_handler(Exception, _unexpected)


async def _http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    status = error.status_code
    message = error.detail
    if status == 404:
        path = request.url.path
        message = _NOT_SERVED.get(path, "Unknown URL") + f": {request.method} {path}"
    elif status == 405:
        message = f"{request.method} is not allowed for {request.url.path}"
    kind = _KINDS.get(status) or HTTPStatus(status).phrase
    return error_response(status, kind, message, headers=error.headers)


async def _unexpected(request: Request, error: Exception) -> Response:
    caller = current_caller.get()
    request_id = caller.request_id if caller is not None else "unknown"
    log.error("unexpected error in %s %s", request.method, request.url.path, exc_info=error)
    return error_response(500, "InternalServerError", f"Internal server error; request id {request_id}")
