"""Which streams need none of vLLM's work for each token, and how they are served without it.

Everything up to the engine's request stays vLLM's: validation, chat template, tokenization, sampling parameters.
Between the request and the client its stream generators are exchanged for ``TextStream`` where the answer is plain
text of one choice. What the client gets is the same, byte for byte.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from vllm.entrypoints.generate.base.protocol import RequestResponseMetadata
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest, ChatCompletionStreamResponse
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat, _make_prompt_tokens_details
from vllm.entrypoints.openai.completion.protocol import CompletionRequest, CompletionStreamResponse
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.serve.engine.protocol import PromptTokenUsageInfo, UsageInfo

from llmserve.gateway.chunks import Chunks, chat_chunks, completion_chunks, event
from llmserve.gateway.generation import BusLLM, FastStream, Generation, serves_fast_streams
from llmserve.gateway.text_stream import TextStream


class ChatLane:
    """Stands in for ``OpenAIServingChat.chat_completion_stream_generator``."""

    def __init__(self, serving: OpenAIServingChat) -> None:
        self._serving = serving
        self._slow = serving.chat_completion_stream_generator
        self._chunks: dict[tuple[str, str, bool, bool, str | None], Chunks] = {}

    def __call__(
        self,
        request: ChatCompletionRequest,
        result_generator: Any,
        request_id: str,
        model_name: str,
        conversation: Any,
        tokenizer: Any,
        request_metadata: RequestResponseMetadata,
        chat_template_kwargs: dict[str, Any] | None = None,
        mm_token_counts: dict[str, int] | None = None,
    ) -> Any:
        fast = serves_fast_streams.get() and self._is_plain(request)
        if not fast or not isinstance(result_generator, Generation):
            return self._slow(
                request,
                result_generator,
                request_id,
                model_name,
                conversation,
                tokenizer,
                request_metadata,
                chat_template_kwargs=chat_template_kwargs,
                mm_token_counts=mm_token_counts,
            )
        role = self._serving.get_chat_request_role(request)
        tier = (request.model_extra or {}).get("service_tier")
        stream = self.stream(request_id, model_name, role, wants_usage=_wants_usage(request), tier=tier)
        return FastStream(result_generator, stream)

    def stream(
        self, request_id: str, model_name: str, role: str, *, wants_usage: bool, tier: str | None = None
    ) -> TextStream:
        """The answer to a chat, not yet of any request; ``tier``: to be told, if one was asked for."""
        serving, created_s = self._serving, int(time.time())

        def usage(stream: TextStream) -> bytes:
            if not wants_usage:
                return b""
            details = _make_prompt_tokens_details(serving.enable_prompt_tokens_details, stream.cached_tokens, 0, None)
            info = _usage(stream)
            chunk = ChatCompletionStreamResponse(
                id=request_id,
                object="chat.completion.chunk",
                created=created_s,
                choices=[],
                model=model_name,
                usage=UsageInfo(**info.model_dump(exclude={"prompt_tokens_details"}), prompt_tokens_details=details),
                system_fingerprint=serving.system_fingerprint,
                metrics=None,
                service_tier=tier,
            )
            return event(chunk, exclude_none=True)

        chunks = self._chunks_of(model_name, role, wants_usage, tier).of_stream(request_id, created_s)
        return TextStream(chunks, usage, _error_event(serving))

    def _is_plain(self, request: ChatCompletionRequest) -> bool:
        """Whether the answer is one choice of text, as it comes from the detokenizer, without anything beside it."""
        if not _is_plain(request) or request.return_prompt_text or request.logprobs:
            return False
        parser = self._serving.parser_cls
        if parser is None:
            return True
        tool_parser = parser.tool_parser_cls
        passes_through = tool_parser is not None and not tool_parser.engine_based_streaming
        return parser.reasoning_parser_cls is None and passes_through and request.tool_choice == "none"

    def _chunks_of(self, model: str, role: str, wants_usage: bool, tier: str | None) -> Chunks:
        drops_empty = self._serving.parser_cls is not None
        key = (model, role, wants_usage, drops_empty, tier)
        known = self._chunks.get(key)
        if known is None:
            fingerprint = None if wants_usage else self._serving.system_fingerprint
            known = self._chunks[key] = chat_chunks(model, role, fingerprint, tier, drops_empty=drops_empty)
        return known


class CompletionLane:
    """Stands in for ``OpenAIServingCompletion.completion_stream_generator``."""

    def __init__(self, serving: OpenAIServingCompletion, engine: BusLLM) -> None:
        self._serving = serving
        self._engine = engine
        self._slow = serving.completion_stream_generator
        self._chunks: dict[tuple[str, bool], Chunks] = {}

    def __call__(
        self,
        request: CompletionRequest,
        engine_inputs: Any,
        result_generator: Any,
        request_id: str,
        created_time: int,
        model_name: str,
        num_prompts: int,
        tokenizer: Any,
        request_metadata: RequestResponseMetadata,
    ) -> Any:
        generation = self._engine.generations.get(f"{request_id}-0")
        fast = serves_fast_streams.get() and num_prompts == 1 and self._is_plain(request)
        if not fast or generation is None:
            return self._slow(
                request,
                engine_inputs,
                result_generator,
                request_id,
                created_time,
                model_name,
                num_prompts=num_prompts,
                tokenizer=tokenizer,
                request_metadata=request_metadata,
            )
        serving, wants_usage = self._serving, _wants_usage(request)

        def usage(stream: TextStream) -> bytes:
            if not wants_usage:
                return b""
            info = _usage(stream)
            if serving.enable_prompt_tokens_details:
                info.prompt_tokens_details = PromptTokenUsageInfo(cached_tokens=stream.cached_tokens)
            chunk = CompletionStreamResponse(
                id=request_id,
                created=created_time,
                model=model_name,
                choices=[],
                usage=info,
                system_fingerprint=serving.system_fingerprint,
                metrics=None,
            )
            return event(chunk, exclude_unset=False, exclude_none=True)

        key = (model_name, wants_usage)
        chunks = self._chunks.get(key)
        if chunks is None:
            fingerprint = None if wants_usage else serving.system_fingerprint
            chunks = self._chunks[key] = completion_chunks(model_name, fingerprint)
        stream = TextStream(chunks.of_stream(request_id, created_time), usage, _error_event(serving))
        return FastStream(generation, stream)

    @staticmethod
    def _is_plain(request: CompletionRequest) -> bool:
        return _is_plain(request) and request.logprobs is None


def install_fast_lane(chat: OpenAIServingChat, completion: OpenAIServingCompletion, engine: BusLLM) -> ChatLane:
    """Put both lanes in place of vLLM's generators of streams; the one of chats."""
    lane = chat.chat_completion_stream_generator = ChatLane(chat)
    completion.completion_stream_generator = CompletionLane(completion, engine)
    return lane


def _is_plain(request: ChatCompletionRequest | CompletionRequest) -> bool:
    options = request.stream_options
    continuous = options is not None and options.include_usage and options.continuous_usage_stats
    return not (
        (request.n or 1) != 1
        or request.use_beam_search
        or request.echo
        or request.return_token_ids
        or request.prompt_logprobs is not None
        or (request.stream_interval or 1) != 1
        or continuous
    )


def _wants_usage(request: ChatCompletionRequest | CompletionRequest) -> bool:
    return request.stream_options is not None and bool(request.stream_options.include_usage)


def _usage(stream: TextStream) -> UsageInfo:
    return UsageInfo(
        prompt_tokens=stream.prompt_tokens,
        completion_tokens=stream.output_tokens,
        total_tokens=stream.prompt_tokens + stream.output_tokens,
    )


def _error_event(serving: OpenAIServingChat | OpenAIServingCompletion) -> Callable[[Exception], bytes]:
    return lambda error: b"data: " + serving.create_streaming_error_response(error).encode() + b"\n\n"
