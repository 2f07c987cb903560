"""From a body on the bus to the request that vLLM's engine core gets, for each stage. No I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from llmserve.bus import frames
from llmserve.bus.cache_salt import request_salt
from llmserve.bus.messages import Stage
from llmserve.kvstore.keys import space_of
from llmserve.workers.connector.wire import HANDOFF, HOLD, RELEASE, Handoff, WireError, decode_handoff
from llmserve.workers.engine.base import EngineError, Work
from llmserve.workers.offload.params import tier_params

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

_PARAMS = "kv_transfer_params"


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request must keep to, or it would stop the engine."""

    max_model_len: int
    vocabulary: int


@dataclass(frozen=True, slots=True)
class Staged:
    """A request ready for the engine core."""

    request: EngineCoreRequest
    holds: bool = False
    """Prefill whose pages are to be handed over when it is done."""
    cached_tokens: int | None = None
    """Decode after a handoff: prompt tokens that the prefill worker found in its cache."""


class RequestStager:
    """Decodes bodies and makes each stage's request of them."""

    def __init__(self, limits: Limits, sharing: Mapping[str, Sequence[str]] | None = None) -> None:
        """``sharing``: the manifest's ``security.cache_sharing`` where there are tiers, None where there are none."""
        from vllm.v1.engine import EngineCoreRequest
        from vllm.v1.serial_utils import MsgpackDecoder

        self._limits = limits
        self._sharing = sharing
        self._decoder = MsgpackDecoder(EngineCoreRequest)

    def stage(self, work: Work, core_id: str) -> Staged:
        """The request for ``work`` under the id ``core_id``. Raises ``EngineError``."""
        request = self._decode(work.body)
        request.request_id = core_id
        request.external_req_id = None
        request.client_index = 0
        request.data_parallel_rank = None
        request.current_wave = 0
        request.resumable = False
        request.abort_immediately = False
        request.session_id = None
        request.kv_hints = None
        # The client's own parameters for KV transfer must not reach the connector.
        params = self._params(request).clone()
        params.extra_args = {k: v for k, v in (params.extra_args or {}).items() if k != _PARAMS} or None
        request.sampling_params = params
        if work.owner_salt:
            request.cache_salt = request_salt(work.owner_salt, request.cache_salt)
        self._check(request, params)
        staged = Staged(request)
        handed_over = len(request.prompt_token_ids or ()) if work.handoff else 0
        if work.stage is Stage.PREFILL:
            staged = self._prefill(request, params, whole_output=work.whole_output)
        elif work.ahead:
            staged = self._fetch_ahead(request, work)
        elif work.stage is Stage.DECODE:
            staged = self._decode_stage(request, params, work)
        if work.tenant and self._sharing is not None:
            space = space_of(work.tenant, self._sharing)
            _add_params(self._params(request), tier_params(space, handed_over, work.compute_tokens_s))
        return staged

    def _decode(self, body: bytes) -> EngineCoreRequest:
        try:
            return self._decoder.decode(frames.unpack(body))
        except (msgspec.MsgspecError, ValueError, TypeError, IndexError, KeyError, NotImplementedError) as error:
            raise EngineError(f"the request's body of {len(body)} bytes is unreadable: {error}") from error

    @staticmethod
    def _params(request: EngineCoreRequest) -> SamplingParams:
        if request.sampling_params is None or request.lora_request is not None:
            raise EngineError("only generation without adapters is served")
        return request.sampling_params

    def _check(self, request: EngineCoreRequest, params: SamplingParams) -> None:
        prompt = request.prompt_token_ids
        if not prompt:
            raise EngineError("the request has no prompt tokens")
        if len(prompt) >= self._limits.max_model_len:
            raise EngineError(
                f"a prompt of {len(prompt)} tokens leaves no room for output within {self._limits.max_model_len}"
            )
        if not 0 <= min(prompt) <= max(prompt) < self._limits.vocabulary:
            raise EngineError(f"prompt tokens must lie in 0 to {self._limits.vocabulary - 1}")
        if params.max_tokens is not None and params.max_tokens < 1:
            raise EngineError(f"max_tokens is {params.max_tokens}, at least 1 is needed")

    def _prefill(self, request: EngineCoreRequest, params: SamplingParams, *, whole_output: bool) -> Staged:
        assert request.prompt_token_ids is not None
        last = params.max_tokens == 1 or len(request.prompt_token_ids) + 1 >= self._limits.max_model_len
        if last:
            return Staged(request)
        if whole_output:
            # Its token is thrown away, so that it must not end the request.
            params = _throw_away_params()
            request.sampling_params = params
        params.max_tokens = 1
        params.min_tokens = min(params.min_tokens, 1)
        _set_params(params, {HOLD: True})
        return Staged(request, holds=True)

    def _decode_stage(self, request: EngineCoreRequest, params: SamplingParams, work: Work) -> Staged:
        assert request.prompt_token_ids is not None
        if not work.whole_output and work.first_tokens:
            done = len(work.first_tokens)
            request.prompt_token_ids = [*request.prompt_token_ids, *work.first_tokens]
            params.min_tokens = max(0, params.min_tokens - done)
            params.prompt_logprobs = None
            if params.max_tokens is not None:
                params.max_tokens -= done
            self._check(request, params)
        if not work.handoff:
            return Staged(request)
        cached_tokens = _read(work.handoff).cached_tokens
        _set_params(params, {HANDOFF: work.handoff})
        return Staged(request, cached_tokens=cached_tokens)

    @staticmethod
    def _fetch_ahead(request: EngineCoreRequest, work: Work) -> Staged:
        """vLLM ends a request only with a token: it computes the one after the pages, which is thrown away."""
        assert request.prompt_token_ids is not None
        request.prompt_token_ids = request.prompt_token_ids[: _read(work.handoff).tokens + 1]
        request.sampling_params = _throw_away_params()
        _set_params(request.sampling_params, {HANDOFF: work.handoff})
        return Staged(request)


def release_request(core_id: str, held_ids: list[str]) -> EngineCoreRequest:
    """A request that is aborted before it runs: vLLM's in-band way to reach the connector's scheduler side."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    params = SamplingParams(max_tokens=1)
    _set_params(params, {RELEASE: held_ids})
    return EngineCoreRequest(
        request_id=core_id,
        prompt_token_ids=[0],
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        abort_immediately=True,
    )


def _read(data: bytes) -> Handoff:
    try:
        return decode_handoff(data)
    except WireError as error:
        raise EngineError(str(error)) from error


def _throw_away_params() -> SamplingParams:
    from vllm.sampling_params import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False)


def _add_params(params: SamplingParams, values: dict[str, Any]) -> None:
    _set_params(params, {**(params.extra_args or {}).get(_PARAMS, {}), **values})


def _set_params(params: SamplingParams, values: dict[str, Any]) -> None:
    params.extra_args = {**(params.extra_args or {}), _PARAMS: values}
