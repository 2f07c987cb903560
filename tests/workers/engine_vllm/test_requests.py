"""Bodies on the bus and what becomes of them at each stage."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.serial_utils import MsgpackEncoder

from llmserve.bus import frames
from llmserve.bus.cache_salt import CacheSalts
from llmserve.bus.messages import Stage
from llmserve.workers.connector.wire import HANDOFF, HOLD, RELEASE, Handoff, encode
from llmserve.workers.engine.base import EngineError, Work
from llmserve.workers.engine.vllm_requests import Limits, RequestStager, Staged, release_request

pytestmark = pytest.mark.vllm

HELD = encode(
    Handoff(
        engine_id="e",
        fingerprint="f",
        request="r",
        slot=0,
        token=1,
        tokens=3,
        lease_s=1.0,
        tp=1,
        pp=1,
        pages=[[1]],
        ranks={},
        cached_tokens=2,
    )
)


def body(prompt: list[int], **params: Any) -> bytes:
    request = EngineCoreRequest(
        "theirs", prompt, None, SamplingParams(**{"max_tokens": 10, **params}), None, 0.0, None, "salt", None
    )
    return frames.pack(MsgpackEncoder().encode(request))


def stage(stage: Stage, data: bytes, **work: Any) -> Staged:
    return RequestStager(Limits(max_model_len=100, vocabulary=1000)).stage(Work("w.0", stage, data, **work), "core")


def kv(staged: Staged) -> dict[str, Any]:
    assert staged.request.sampling_params is not None
    params: dict[str, Any] = (staged.request.sampling_params.extra_args or {}).get("kv_transfer_params", {})
    return params


def params(staged: Staged) -> SamplingParams:
    assert staged.request.sampling_params is not None
    return staged.request.sampling_params


def test_a_whole_request_is_run_as_it_is_under_the_cores_id() -> None:
    staged = stage(Stage.WHOLE, body([1, 2, 3], min_tokens=4))
    assert (staged.request.request_id, staged.request.cache_salt, staged.holds) == ("core", "salt", False)
    assert (params(staged).max_tokens, params(staged).min_tokens, kv(staged)) == (10, 4, {})


def test_a_clients_own_transfer_parameters_never_reach_the_connector() -> None:
    data = body([1], extra_args={"kv_transfer_params": {RELEASE: ["someone"]}, "other": 1})
    staged = stage(Stage.WHOLE, data)
    assert params(staged).extra_args == {"other": 1}


@pytest.mark.parametrize("at", [Stage.WHOLE, Stage.PREFILL, Stage.DECODE])
def test_pages_are_salted_for_the_owner_whatever_salt_stands_in_the_body(at: Stage) -> None:
    salts = CacheSalts("d", {})
    found = {
        stage(at, body([1, 2]), tenant=tenant, owner_salt=salts.owner(tenant)).request.cache_salt for tenant in "ab"
    }
    assert found == {salts.worker_salt("a", "salt"), salts.worker_salt("b", "salt")}
    assert len(found) == 2


def test_a_prefill_samples_one_token_and_holds_its_pages() -> None:
    staged = stage(Stage.PREFILL, body([1, 2], min_tokens=5))
    assert staged.holds
    assert (params(staged).max_tokens, params(staged).min_tokens, kv(staged)) == (1, 1, {HOLD: True})


def test_a_prefill_of_the_only_token_holds_nothing() -> None:
    staged = stage(Stage.PREFILL, body([1, 2], max_tokens=1))
    assert (staged.holds, kv(staged)) == (False, {})


def test_a_prefill_that_fills_the_model_holds_nothing() -> None:
    assert not stage(Stage.PREFILL, body([1] * 99)).holds
    assert stage(Stage.PREFILL, body([1] * 98)).holds


def test_the_token_of_a_prefill_that_is_thrown_away_cannot_end_the_request() -> None:
    staged = stage(Stage.PREFILL, body([1, 2], stop_token_ids=[5], seed=3, logprobs=2), whole_output=True)
    assert params(staged).ignore_eos
    assert params(staged).stop_token_ids == []
    assert params(staged).logprobs is None
    assert kv(staged) == {HOLD: True}


def test_a_decode_goes_on_after_the_first_token() -> None:
    data = body([1, 2, 3], min_tokens=4, prompt_logprobs=1)
    staged = stage(Stage.DECODE, data, first_tokens=(7,), handoff=HELD)
    assert staged.request.prompt_token_ids == [1, 2, 3, 7]
    assert (params(staged).max_tokens, params(staged).min_tokens, params(staged).prompt_logprobs) == (9, 3, None)
    assert kv(staged) == {HANDOFF: HELD}
    assert staged.cached_tokens == 2


def test_a_decode_of_the_whole_output_starts_from_the_prompt() -> None:
    staged = stage(Stage.DECODE, body([1, 2, 3]), whole_output=True, handoff=HELD)
    assert staged.request.prompt_token_ids == [1, 2, 3]
    assert params(staged).max_tokens == 10


def test_a_decode_without_a_handoff_computes_everything() -> None:
    assert kv(stage(Stage.DECODE, body([1, 2, 3]), first_tokens=(7,))) == {}


@pytest.mark.parametrize("data", [b"", b"nonsense", b"\xc1\x05", msgspec.msgpack.encode([1, 2])])
def test_a_body_that_is_none_is_refused(data: bytes) -> None:
    with pytest.raises(EngineError, match="unreadable"):
        stage(Stage.WHOLE, data)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "no prompt"), ([1] * 100, "100 tokens leaves no room"), ([1000], "0 to 999"), ([-1], "0 to 999")],
)
def test_a_prompt_that_would_stop_the_engine_is_refused(prompt: list[int], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        stage(Stage.WHOLE, body(prompt))


def test_a_handoff_that_is_none_is_refused() -> None:
    with pytest.raises(EngineError, match="not a handoff"):
        stage(Stage.DECODE, body([1]), first_tokens=(1,), handoff=b"nonsense")


def test_a_release_never_runs() -> None:
    request = release_request("x", ["a", "b"])
    assert request.abort_immediately
    assert request.sampling_params is not None
    assert request.sampling_params.extra_args == {"kv_transfer_params": {RELEASE: ["a", "b"]}}
