"""The short way of a streamed request to vLLM's serving classes, past FastAPI.

It reads the same body with the same models, and calls the same method, as vLLM's route does. Whatever is not a valid
streamed request takes vLLM's route, from which the answer then comes; so does an error come from vLLM's handlers.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.entrypoints.serve.engine.protocol import ErrorResponse

from llmserve.gateway.generation import FastStream, serves_fast_streams
from llmserve.gateway.inline import INLINE_BYTES, small_request
from llmserve.gateway.presence import Presence

if TYPE_CHECKING:
    from fastapi import FastAPI

Create = Callable[[Any, Request], Awaitable[Any]]


class FastRoute:
    """One path: ``create`` is the method of the serving class, ``app`` vLLM's server."""

    def __init__(self, model: type[BaseModel], create: Create, app: FastAPI, failed: ASGIApp) -> None:
        self._model = model
        self._create = create
        self._app = app
        self._failed = failed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _read(receive)
        if body is None:
            return
        # Inherited by the task that makes the request; a task of its own serves every request.
        small_request.set(len(body) <= INLINE_BYTES)
        request = self._parse(scope, body)
        if request is None:
            await self._app(scope, _replayed(body, receive), send)
            return
        scope["app"] = self._app
        token = serves_fast_streams.set(True)
        presence = Presence(scope, receive)
        try:
            try:
                response = await presence.cancels(self._accepted(request, Request(scope, receive, send)))
            except Exception as error:
                await self._failed({**scope, _ERROR: error}, receive, send)
                return
            if isinstance(response, FastStream):
                await response.serve(scope, presence, send)
        finally:
            presence.stop()
            serves_fast_streams.reset(token)
        if response is not None and not isinstance(response, FastStream):
            await response(scope, receive, send)

    def _parse(self, scope: Scope, body: bytes) -> BaseModel | None:
        """The request, if it is a streamed one and nothing is wrong with it."""
        if b'"stream"' not in body or not _is_json(scope):
            return None
        try:
            request = self._model.model_validate(json.loads(body))
        except Exception:
            # Whatever it is, a nesting too deep included: vLLM's route says what is wrong.
            return None
        return request if getattr(request, "stream", False) else None

    async def _accepted(self, request: BaseModel, raw_request: Request) -> FastStream | ASGIApp:
        made = await self._create(request, raw_request)
        if isinstance(made, FastStream):
            # Before the response begins, so that a refusal has its own status.
            await made.open()
            return made
        if isinstance(made, ErrorResponse):
            return JSONResponse(made.model_dump(), made.error.code)
        return StreamingResponse(made, media_type="text/event-stream")


class FastRoutes:
    """The short way for the paths that have one, ``app`` for everything else."""

    def __init__(self, app: FastAPI, ways: dict[str, FastRoute]) -> None:
        self._app = app
        self._ways = ways

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        way = self._ways.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        await (self._app if way is None else way)(scope, receive, send)


def fast_routes(app: FastAPI) -> FastRoutes:
    """The short way before vLLM's routes of chat and completions."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    chat, completion = app.state.openai_serving_chat, app.state.openai_serving_completion
    failed = _failed(app)
    ways = {
        "/v1/chat/completions": FastRoute(ChatCompletionRequest, chat.create_chat_completion, app, failed),
        "/v1/completions": FastRoute(CompletionRequest, completion.create_completion, app, failed),
    }
    return FastRoutes(app, ways)


_ERROR = "llmserve.error"
"""Key of the scope of a request that has failed."""


def _failed(app: FastAPI) -> ASGIApp:
    """Answers as ``app`` would if a route of its raised the error."""

    async def raises(scope: Scope, receive: Receive, send: Send) -> None:
        error: Exception = scope[_ERROR]
        raise error

    # As Starlette stacks them.
    handlers = dict(app.exception_handlers)
    unexpected = handlers.pop(500, None) or handlers.pop(Exception, None)
    return ServerErrorMiddleware(ExceptionMiddleware(raises, handlers=handlers), handler=unexpected)


async def _read(receive: Receive) -> bytes | None:
    """The whole body, None if the client went before its end."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A body that was read already, then whatever comes."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


def _is_json(scope: Scope) -> bool:
    for name, value in scope["headers"]:
        if name == b"content-type":
            return bytes(value).partition(b";")[0].strip().lower() == b"application/json"
    return False
