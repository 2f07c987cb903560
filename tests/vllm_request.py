"""Greedy requests as the gateway encodes them for vLLM's engines."""

from __future__ import annotations

from collections.abc import Sequence

from llmserve.gateway.codec import RequestCodec


def codec(prompt: Sequence[int], max_tokens: int) -> RequestCodec:
    """Of a request that yields exactly ``max_tokens``."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.serial_utils import MsgpackEncoder

    from llmserve.gateway.vllm_codec import VllmRequestCodec

    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    request = EngineCoreRequest("", list(prompt), None, params, None, 0.0, None, None, None)
    return VllmRequestCodec(request, "", MsgpackEncoder())
