"""vLLM's requests and outputs on the bus. Held to vLLM 0.32: it reads fields of private structs."""

from __future__ import annotations

import copy
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmserve.bus.block_hashes import short_hashes
from llmserve.bus.frames import pack, unpack
from llmserve.bus.messages import Reason
from llmserve.gateway.attempts import Mode
from llmserve.gateway.call import Arrival
from llmserve.gateway.codec import Refusal, RequestCodec

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

_GREEDY_BELOW = 1e-5
"""vLLM's own bound: a lower temperature is greedy sampling."""


def has_state(params: SamplingParams) -> bool:
    """Whether sampling looks at output tokens or carries state from one token to the next.

    ``logit_bias``, ``allowed_token_ids``, ``min_p``, stop tokens and banned single tokens do not: they read the
    current step's logits only.
    """
    return bool(
        params.presence_penalty
        or params.frequency_penalty
        or params.repetition_penalty != 1.0
        or params.seed is not None
        or params.min_tokens
        or params.structured_outputs is not None
        or params.bad_words
        or params.thinking_token_budget is not None
        or params.repetition_detection is not None
        or params.trace_decode_token_ids is not None
        or params.watermarking
        # Custom logits processors get their arguments here, and may do anything.
        or params.extra_args
    )


def mode_of(params: SamplingParams) -> Mode:
    """What a further attempt of a request with ``params`` can do."""
    if not has_state(params):
        return Mode.RESUME
    deterministic = params.temperature < _GREEDY_BELOW or params.seed is not None
    return Mode.REPLAY if deterministic else Mode.ONCE


def repeatable(params: SamplingParams) -> SamplingParams:
    """``params`` such that a further attempt can draw the same tokens: random sampling that has state gets a seed.

    Custom logits processors may do anything, so that a seed would not help them.
    """
    random = params.temperature >= _GREEDY_BELOW and params.seed is None
    if not random or not has_state(params) or params.extra_args:
        return params
    seeded = copy.copy(params)
    seeded.seed = secrets.randbits(63)
    return seeded


def refuse_unsupported(request: EngineCoreRequest) -> None:
    """Raise ``Refusal`` for what no worker can do from a message on the bus."""
    params = request.sampling_params
    extra = (params.extra_args if params is not None else None) or {}
    present = {
        "pooling": request.pooling_params is not None or params is None,
        "multimodal input": bool(request.mm_features),
        "LoRA": request.lora_request is not None,
        "prompt_embeds": request.prompt_embeds is not None,
        "streaming input": bool(request.resumable),
        "kv_transfer_params": "kv_transfer_params" in extra,
        "ec_transfer_params": "ec_transfer_params" in extra,
        "kv_hints": request.kv_hints is not None,
    }
    if named := [name for name, found in present.items() if found]:
        raise Refusal(f"{', '.join(named)} is not supported by this deployment")


class VllmRequestCodec(RequestCodec):
    """One ``EngineCoreRequest``."""

    def __init__(
        self, request: EngineCoreRequest, cache_salt: str, encoder: MsgpackEncoder, page_salt: str | None = None
    ) -> None:
        """``page_salt``: the one that workers make of ``cache_salt``; None: nothing is said about blocks."""
        self._request = request
        self._cache_salt = cache_salt
        self._page_salt = page_salt
        self._encoder = encoder
        params = request.sampling_params = repeatable(request.sampling_params)
        self.mode = mode_of(params)
        self.whole_output = has_state(params)
        self.prompt_tokens = len(request.prompt_token_ids)
        self.max_tokens = params.max_tokens

    def body(self, request_id: str, delivered: Sequence[int]) -> bytes:
        request = copy.copy(self._request)
        request.request_id = request_id
        request.external_req_id = None
        request.cache_salt = self._cache_salt
        request.trace_headers = None
        request.data_parallel_rank = None
        request.session_id = None
        request.priority = 0
        if delivered:
            request.prompt_token_ids = [*request.prompt_token_ids, *delivered]
            params = copy.copy(request.sampling_params)
            params.max_tokens = self.max_tokens - len(delivered)
            # They came with the first token.
            params.prompt_logprobs = None
            params.prompt_logprob_token_ids = None
            request.sampling_params = params
        return pack(self._encoder.encode(request))

    def block_hashes(self, delivered: Sequence[int], block_tokens: int) -> bytes:
        # vLLM computes the whole prompt again if its log probabilities are asked for.
        if self._page_salt is None or (self._request.sampling_params.prompt_logprobs is not None and not delivered):
            return b""
        return short_hashes([*self._request.prompt_token_ids, *delivered], block_tokens, self._page_salt)


class VllmOutputs:
    """From deltas to vLLM's outputs."""

    def __init__(self) -> None:
        from vllm.v1.engine import EngineCoreOutput, FinishReason
        from vllm.v1.metrics.stats import PrefillStats
        from vllm.v1.serial_utils import MsgpackDecoder

        self._output_class = EngineCoreOutput
        self._stats_class = PrefillStats
        self._decoder: MsgpackDecoder = MsgpackDecoder(EngineCoreOutput)
        self._reasons = {
            Reason.STOP: FinishReason.STOP,
            Reason.LENGTH: FinishReason.LENGTH,
            Reason.CANCELLED: FinishReason.ABORT,
            Reason.ERROR: FinishReason.ERROR,
        }

    def output(self, arrival: Arrival) -> EngineCoreOutput:
        """What is new in ``arrival``, as vLLM's engine core would have said it."""
        delta, skip = arrival.delta, arrival.skip
        output = self._output_class(arrival.local_id, delta.tokens[skip:] if skip else delta.tokens)
        if arrival.reason is not None:
            output.finish_reason = self._reasons[arrival.reason]
            output.stop_reason = delta.stop_reason
        # A further attempt finds what the first one computed: that is none of the client's.
        if delta.cached_tokens is not None and delta.offset == 0 and skip == 0:
            output.prefill_stats = self._stats_class(num_cached_tokens=delta.cached_tokens)
        if delta.extra:
            self._add_extra(output, delta.extra, skip, first=delta.offset == 0 and skip == 0)
        return output

    def _add_extra(self, output: EngineCoreOutput, extra: bytes, skip: int, first: bool) -> None:
        said = self._decoder.decode(unpack(extra))
        if first:
            output.new_prompt_logprobs_tensors = said.new_prompt_logprobs_tensors
            output.prompt_token_id_logprobs = said.prompt_token_id_logprobs
        logprobs = said.new_logprobs
        if logprobs is not None:
            kept = len(output.new_token_ids)
            output.new_logprobs = logprobs.slice_request(skip, kept) if skip else logprobs
