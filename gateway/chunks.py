"""The events of a streamed answer as bytes: vLLM's own, with what changes from one to the next filled in.

vLLM builds and validates a tree of models for every token. Here its models are encoded once for a deployment, with
marks where the stream's and the token's values go.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

DONE = b"data: [DONE]\n\n"
_ID, _CREATED, _TEXT, _FINISH, _STOP = "\ue000id", 7_700_000_077, "\ue000text", "\ue000finish", "\ue000stop"

encode_json = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Chunk:
    """One kind of event as a template."""

    template: bytes

    def of_stream(self, stream_id: str, created_s: int) -> bytes:
        """The template for one stream, still with the marks of its tokens."""
        filled = self.template.replace(_mark(_ID), encode_json(stream_id))
        return filled.replace(str(_CREATED).encode(), str(created_s).encode())


@dataclass(frozen=True, slots=True)
class Chunks:
    """Every kind of event of one route, without usage."""

    first: Chunk | None
    """Sent before the first token."""
    text: Chunk
    last: Chunk
    last_empty: Chunk | None = None
    """The last one if it has no text, where that is of another shape."""
    drops_empty: bool = False
    """Tokens without text yield no event, but for the last."""

    def of_stream(self, stream_id: str, created_s: int) -> StreamChunks:
        return StreamChunks(self, stream_id, created_s)


class StreamChunks:
    """The events of one stream."""

    def __init__(self, chunks: Chunks, stream_id: str, created_s: int) -> None:
        self._chunks = chunks
        self._stream = (stream_id, created_s)
        self._before, self._behind = chunks.text.of_stream(stream_id, created_s).split(_mark(_TEXT))

    def first(self) -> bytes:
        """What goes before the first token; may be empty."""
        return self._chunks.first.of_stream(*self._stream) if self._chunks.first is not None else b""

    def text(self, text: str) -> bytes:
        """Tokens whose text is ``text``; empty if they yield no event."""
        if not text and self._chunks.drops_empty:
            return b""
        return self._before + encode_json(text) + self._behind

    def last(self, text: str, finish_reason: str, stop_reason: int | str | None) -> bytes:
        """The last tokens."""
        chunk = self._chunks.last
        if not text and self._chunks.last_empty is not None:
            chunk = self._chunks.last_empty
        # The text last: it may hold anything, a mark too.
        filled = chunk.of_stream(*self._stream).replace(_mark(_FINISH), encode_json(finish_reason))
        return filled.replace(_mark(_STOP), encode_json(stop_reason)).replace(_mark(_TEXT), encode_json(text))


def chat_chunks(
    model: str, role: str, fingerprint: str | None, tier: str | None = None, *, drops_empty: bool
) -> Chunks:
    """Events of ``/v1/chat/completions``; ``fingerprint`` stands in the last one, ``tier`` in all.

    ``drops_empty``: as vLLM does it when a tool parser stands between the tokens and the client.
    """
    from vllm.entrypoints.generate.base.protocol import DeltaMessage
    from vllm.entrypoints.openai.chat_completion.protocol import (
        ChatCompletionResponseStreamChoice,
        ChatCompletionStreamResponse,
    )

    told = {} if tier is None else {"service_tier": tier}

    def chunk(choice: ChatCompletionResponseStreamChoice, **fields: None) -> ChatCompletionStreamResponse:
        return ChatCompletionStreamResponse(
            id=_ID, object="chat.completion.chunk", created=_CREATED, choices=[choice], model=model, **fields, **told
        )

    def last(delta: DeltaMessage) -> Chunk:
        choice = ChatCompletionResponseStreamChoice(
            index=0, delta=delta, logprobs=None, finish_reason=_FINISH, stop_reason=_STOP, token_ids=None
        )
        ended = chunk(choice)
        if fingerprint is not None:
            ended.system_fingerprint = fingerprint
        return _template(ended)

    greeting = ChatCompletionResponseStreamChoice(
        index=0, delta=DeltaMessage(role=role, content=""), logprobs=None, finish_reason=None
    )
    text = ChatCompletionResponseStreamChoice(
        index=0, delta=DeltaMessage(content=_TEXT), logprobs=None, finish_reason=None, token_ids=None
    )
    return Chunks(
        first=_template(chunk(greeting, prompt_token_ids=None, prompt_text=None)),
        text=_template(chunk(text)),
        last=last(DeltaMessage(content=_TEXT)),
        last_empty=last(DeltaMessage()) if drops_empty else None,
        drops_empty=drops_empty,
    )


def completion_chunks(model: str, fingerprint: str | None) -> Chunks:
    """Events of ``/v1/completions``; ``fingerprint`` stands in the last one."""
    from vllm.entrypoints.openai.completion.protocol import (
        CompletionResponseStreamChoice,
        CompletionStreamResponse,
    )

    def chunk(finish_reason: str | None, stop_reason: str | None) -> CompletionStreamResponse:
        choice = CompletionResponseStreamChoice(
            index=0,
            text=_TEXT,
            logprobs=None,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            prompt_token_ids=None,
            token_ids=None,
        )
        return CompletionStreamResponse(
            id=_ID, object="text_completion", created=_CREATED, model=model, choices=[choice]
        )

    last = chunk(_FINISH, _STOP)
    if fingerprint is not None:
        last.system_fingerprint = fingerprint
    return Chunks(first=None, text=_template(chunk(None, None)), last=_template(last))


def event(model: object, *, exclude_unset: bool = True, exclude_none: bool = False) -> bytes:
    """One of vLLM's own models as an event."""
    data: str = model.model_dump_json(exclude_unset=exclude_unset, exclude_none=exclude_none)  # type: ignore[attr-defined]
    return b"data: " + data.encode() + b"\n\n"


def _template(model: object) -> Chunk:
    return Chunk(event(model))


def _mark(mark: str) -> bytes:
    return encode_json(mark)
