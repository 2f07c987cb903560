"""Streamed chats that differ from an earlier one in their messages only: nearly all that one application sends.

vLLM reads, checks and converts the same options again for each of them, at more cost than all that follows. Here the
engine's request of the earlier one is the pattern for those that are alike: what comes from the prompt and its length
is made anew, everything else is what vLLM made of the same bytes.
"""

from __future__ import annotations

import copy
import itertools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import msgspec
from vllm.entrypoints.serve.utils.api_utils import get_max_tokens

from llmserve.gateway.generation import FastStream
from llmserve.gateway.plain_prompts import PlainMessage, PlainPrompts

if TYPE_CHECKING:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.v1.engine import EngineCoreRequest

    from llmserve.gateway.engine_client import BusEngineClient
    from llmserve.gateway.fast_lane import ChatLane
    from llmserve.gateway.text_stream import TextStream

Options: TypeAlias = tuple[tuple[str, bytes], ...]
"""All fields of a body but its messages, as they are written there."""

_KNOWN_OPTIONS = frozenset(
    {
        *("model", "stream", "stream_options", "user", "n", "max_tokens", "max_completion_tokens", "min_tokens"),
        *("temperature", "top_p", "top_k", "min_p", "seed", "logit_bias", "stop", "stop_token_ids", "ignore_eos"),
        *("presence_penalty", "frequency_penalty", "repetition_penalty", "cache_salt"),
        *("skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output"),
    }
)
"""Those that change neither how messages become a prompt, nor anything else with what the messages are."""
_KEPT = 256

_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_messages = msgspec.json.Decoder(list[PlainMessage])


@dataclass(frozen=True, slots=True)
class PlainChat:
    """A body taken apart."""

    options: Options
    messages: list[PlainMessage]


@dataclass(frozen=True, slots=True)
class _Pattern:
    request: EngineCoreRequest
    asked_tokens: int | None
    """The bound on the answer that the client gave."""
    wants_usage: bool


class PatternedGeneration:
    """For ``FastStream``: a request that goes to the engine client past ``AsyncLLM``."""

    def __init__(self, client: BusEngineClient, request: EngineCoreRequest) -> None:
        self._client = client
        self._request = request

    async def start(self, stream: TextStream) -> str:
        await self._client.add_stream(self._request, stream)
        request_id: str = self._request.request_id
        return request_id

    async def stop(self, request_id: str) -> None:
        await self._client.abort_requests_async([request_id])


class ChatPatterns:
    """The newest patterns, and the streams made from them."""

    def __init__(
        self, serving: OpenAIServingChat, lane: ChatLane, client: BusEngineClient, prompts: PlainPrompts
    ) -> None:
        self._serving = serving
        self._lane = lane
        self._client = client
        self._prompts = prompts
        self._model = serving.models.model_name()
        self._max_model_tokens = serving.model_config.max_model_len
        self._patterns: dict[Options, _Pattern | None] = {}
        """In the order of use. None: seen once, which many will be that never come again."""
        self._numbers = itertools.count()

    def stream(self, chat: PlainChat, request_id: str) -> FastStream | None:
        """The answer to a chat that is like an earlier one, None if there is none or vLLM might refuse it."""
        pattern = self._patterns.get(chat.options)
        if pattern is None:
            return None
        self._keep(chat.options, pattern)
        request = self._request(pattern, chat)
        if request is None:
            return None
        request_id = f"chatcmpl-{request_id}"
        request.request_id = f"{request_id}/{next(self._numbers)}"
        role, wants_usage = self._serving.response_role, pattern.wants_usage
        stream = self._lane.stream(request_id, self._model, role, wants_usage=wants_usage)
        return FastStream(PatternedGeneration(self._client, request), stream)

    def learn(self, chat: PlainChat, asked: ChatCompletionRequest, made: EngineCoreRequest) -> None:
        """vLLM has made ``made`` of ``chat``, which it read as ``asked``."""
        if chat.options not in self._patterns:
            self._keep(chat.options, None)
            return
        if not _KNOWN_OPTIONS.issuperset(name for name, _ in chat.options):
            return
        tokens = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
        options = asked.stream_options
        pattern = _Pattern(made, tokens, options is not None and bool(options.include_usage))
        same = self._request(pattern, chat)
        if same is not None and _parts(same) == _parts(made):
            self._keep(chat.options, pattern)

    def _keep(self, options: Options, pattern: _Pattern | None) -> None:
        self._patterns.pop(options, None)
        self._patterns[options] = pattern
        while len(self._patterns) > _KEPT:
            del self._patterns[next(iter(self._patterns))]

    def _request(self, pattern: _Pattern, chat: PlainChat) -> EngineCoreRequest | None:
        tokens = self._prompts.tokens(chat.messages)
        if tokens is None or not 0 < len(tokens) < self._max_model_tokens:
            return None
        request = copy.copy(pattern.request)
        params = request.sampling_params = copy.copy(pattern.request.sampling_params)
        serving, asked_tokens = self._serving, pattern.asked_tokens
        params.max_tokens = get_max_tokens(
            self._max_model_tokens,
            asked_tokens,
            len(tokens),
            serving.default_sampling_params,
            serving.override_max_tokens,
        )
        if params.max_tokens < max(1, params.min_tokens):
            return None
        request.prompt_token_ids = tokens
        request.arrival_time = time.time()
        return request


def plain_chat(body: bytes) -> PlainChat | None:
    """The body of a chat of nothing but text; None if it is anything else, or might not be JSON to others."""
    try:
        fields = _fields.decode(body.decode())
        messages = _messages.decode(fields.pop("messages", b""))
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    return PlainChat(tuple([(name, bytes(value)) for name, value in fields.items()]), messages)


def _parts(request: EngineCoreRequest) -> tuple[object, ...]:
    return request.prompt_token_ids, request.sampling_params
