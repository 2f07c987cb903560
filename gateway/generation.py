"""Generations that can be taken over between the engine's request and the client, before they begin."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakValueDictionary

from starlette.types import Scope, Send
from vllm.v1.engine.async_llm import AsyncLLM

from llmserve.gateway.http_protocol import writer_of
from llmserve.gateway.presence import Presence
from llmserve.gateway.text_stream import TextStream

if TYPE_CHECKING:
    from vllm.v1.engine.output_processor import RequestOutputCollector

current_stream: ContextVar[TextStream | None] = ContextVar("llmserve_stream", default=None)
"""The stream for which a request is being added to the engine."""

serves_fast_streams: ContextVar[bool] = ContextVar("llmserve_serves_fast_streams", default=False)
"""Whether whoever serves the request knows what to do with a ``FastStream``: vLLM's routes do not."""


class Generation:
    """A generation that was asked for and not begun: iterated, it is what ``AsyncLLM.generate`` returns."""

    def __init__(self, engine: AsyncLLM, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        self._engine = engine
        self._arguments = arguments
        self._options = options
        self._outputs: Any = None

    async def start(self, stream: TextStream) -> str:
        """Make the engine's request and have its tokens go to ``stream``; returns the request's id in the engine."""
        prompt, params, request_id = self._arguments
        token = current_stream.set(stream)
        try:
            collector: RequestOutputCollector = await self._engine.add_request(
                request_id, prompt, params, **self._options
            )
        finally:
            current_stream.reset(token)
        return str(collector.request_id)

    async def stop(self, request_id: str) -> None:
        """Have the engine forget a request that was started."""
        await self._engine.abort(request_id, internal=True)

    def __aiter__(self) -> Any:
        self._outputs = AsyncLLM.generate(self._engine, *self._arguments, **self._options)
        return self._outputs

    async def __anext__(self) -> Any:
        if self._outputs is None:
            self.__aiter__()
        return await self._outputs.__anext__()

    async def aclose(self) -> None:
        if self._outputs is not None:
            await self._outputs.aclose()


class BusLLM(AsyncLLM):  # type: ignore[misc]
    """vLLM's engine interface whose generations can be taken over before they begin."""

    generations: WeakValueDictionary[str, Generation]
    """By the request id that the serving class gave."""

    def generate(self, prompt: Any, sampling_params: Any, request_id: str, **options: Any) -> Generation:
        generation = Generation(self, (prompt, sampling_params, request_id), options)
        self.generations[request_id] = generation
        return generation


class Startable(Protocol):
    """What a ``FastStream`` needs of a generation; both are as in ``Generation``."""

    async def start(self, stream: TextStream) -> str: ...
    async def stop(self, request_id: str) -> None: ...


class FastStream:
    """An answer in the fast lane."""

    def __init__(self, generation: Startable, stream: TextStream) -> None:
        self._generation = generation
        self.stream = stream
        self._request_id: str | None = None

    async def open(self) -> None:
        """Have the request accepted. Raises what becomes an error response."""
        self._request_id = await self._generation.start(self.stream)

    async def serve(self, scope: Scope, presence: Presence, send: Send) -> None:
        """Stream the answer; when the client goes, or anything else ends this early, the request is stopped."""
        assert self._request_id is not None

        async def send_body(data: bytes) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": True})

        last = None
        presence.tells(self.stream.leave)
        try:
            await send({"type": "http.response.start", "status": 200, "headers": list(_STREAM_HEADERS)})
            last = await self.stream.serve(send_body, writer_of(scope))
        finally:
            if last is None:
                await self._generation.stop(self._request_id)
        if last is not None:
            await send({"type": "http.response.body", "body": last, "more_body": False})


_STREAM_HEADERS = ((b"content-type", b"text/event-stream; charset=utf-8"),)
"""Of starlette's ``StreamingResponse`` for vLLM's media type."""
