"""What the simulated engine reads of a vLLM request, without importing vLLM.

vLLM encodes ``EngineCoreRequest`` as a msgpack array in which only positions count (0 request id, 1 prompt token
ids, 3 sampling parameters, 7 cache salt) and ``SamplingParams`` as a map that leaves defaults out. Fields not named
here, and trailing positions, are skipped unread. ``tests/workers/test_wire.py`` holds this to vLLM's own encoder.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from llmserve.workers.engine.base import EngineError

API = "vllm-0.32.0"
"""Engine API of the bodies that ``decode_body`` reads."""


@dataclass(frozen=True, slots=True)
class Body:
    """The part of a request that shapes its output's length."""

    prompt: list[int]
    max_tokens: int | None
    """None: up to the model's length."""
    min_tokens: int
    stop_token_ids: frozenset[int]
    cache_salt: str | None = None


class _Sampling(msgspec.Struct, gc=False):
    stop_token_ids: list[int] | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0


class _Request(msgspec.Struct, array_like=True, gc=False):
    request_id: str
    prompt_token_ids: list[int] | None
    mm_features: msgspec.Raw
    sampling_params: _Sampling | None
    pooling_params: msgspec.Raw = msgspec.Raw()
    arrival_time: float = 0.0
    lora_request: msgspec.Raw = msgspec.Raw()
    cache_salt: str | None = None


_decoder = msgspec.msgpack.Decoder(_Request)


def decode_body(body: bytes) -> Body:
    """The request in ``body``. Raises ``EngineError`` if it is none, or one without tokens to prefill."""
    try:
        request = _decoder.decode(body)
    except msgspec.MsgspecError as error:
        raise EngineError(f"body is not a request of {API}: {error}") from error
    if not request.prompt_token_ids:
        raise EngineError("request has no prompt tokens")
    if request.sampling_params is None:
        raise EngineError("request has no sampling parameters: pooling is not supported")
    sampling = request.sampling_params
    return Body(
        prompt=request.prompt_token_ids,
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        stop_token_ids=frozenset(sampling.stop_token_ids or ()),
        cache_salt=request.cache_salt,
    )
