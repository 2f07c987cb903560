"""The short way of a streamed request to vLLM's serving classes, past FastAPI.

It reads the same body with the same models, and calls the same method, as vLLM's route does, unless the request is
like an earlier one (``patterns``). Whatever is not a valid streamed request takes vLLM's route, from which the answer
then comes; so does an error come from vLLM's handlers.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.entrypoints.serve.engine.protocol import ErrorResponse

from llmserve.gateway.caller import current_caller
from llmserve.gateway.generation import FastStream, serves_fast_streams
from llmserve.gateway.inline import INLINE_BYTES, small_request
from llmserve.gateway.patterns import ChatPatterns, PlainChat, plain_chat
from llmserve.gateway.presence import Presence

if TYPE_CHECKING:
    from fastapi import FastAPI

Create = Callable[[Any, Request], Awaitable[Any]]


class FastRoute:
    """One path: ``create`` is the method of the serving class, ``app`` vLLM's server."""

    def __init__(
        self, model: type[BaseModel], create: Create, app: FastAPI, failed: ASGIApp, patterns: ChatPatterns | None
    ) -> None:
        self._patterns = patterns
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
        chat = self._plain(scope, body)
        stream = self._alike(scope, chat)
        request = self._parse(scope, body) if stream is None else None
        opened: Coroutine[Any, Any, FastStream | ASGIApp]
        if stream is not None:
            opened = self._opened(stream)
        elif request is not None:
            scope["app"] = self._app
            opened = self._accepted(request, Request(scope, receive, send), chat)
        else:
            await self._app(scope, _replayed(body, receive), send)
            return
        presence = Presence(scope, receive)
        try:
            try:
                response = await presence.cancels(opened)
            except Exception as error:
                await self._failed({**scope, _ERROR: error}, receive, send)
                return
            if isinstance(response, FastStream):
                await response.serve(scope, presence, send)
        finally:
            presence.stop()
        if response is not None and not isinstance(response, FastStream):
            await response(scope, receive, send)

    def _plain(self, scope: Scope, body: bytes) -> PlainChat | None:
        """The request, if ``patterns`` may know it."""
        if self._patterns is None or len(body) > INLINE_BYTES or not _is_json(scope):
            return None
        return plain_chat(body)

    def _alike(self, scope: Scope, chat: PlainChat | None) -> FastStream | None:
        """The answer to a chat that is like an earlier one."""
        caller = current_caller.get()
        if self._patterns is None or chat is None or caller is None:
            return None
        for name, value in scope["headers"]:
            # vLLM says what is wrong with the one, and takes another for its id than we for ours.
            if name == b"x-data-parallel-rank" or (name == b"x-request-id" and value != caller.request_id.encode()):
                return None
        return self._patterns.stream(chat, caller.request_id)

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

    @staticmethod
    async def _opened(stream: FastStream) -> FastStream:
        # Before the response begins, so that a refusal has its own status.
        await stream.open()
        return stream

    async def _accepted(self, request: Any, raw_request: Request, chat: PlainChat | None) -> FastStream | ASGIApp:
        token = serves_fast_streams.set(True)
        try:
            made = await self._create(request, raw_request)
        finally:
            serves_fast_streams.reset(token)
        if isinstance(made, FastStream):
            await self._opened(made)
            if self._patterns is not None and chat is not None and made.stream.request is not None:
                self._patterns.learn(chat, request, made.stream.request)
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


def fast_routes(app: FastAPI, patterns: ChatPatterns | None) -> FastRoutes:
    """The short way before vLLM's routes of chat and completions; ``patterns`` are of chats."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    chat, completion = app.state.openai_serving_chat, app.state.openai_serving_completion
    failed = _failed(app)
    ways = {
        "/v1/chat/completions": FastRoute(ChatCompletionRequest, chat.create_chat_completion, app, failed, patterns),
        "/v1/completions": FastRoute(CompletionRequest, completion.create_completion, app, failed, None),
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
