"""Keys, readiness, what is resumed and what is replayed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmserve.bus.messages import Heartbeat, Role
from llmserve.gateway.attempts import Mode
from llmserve.gateway.identity import ApiKeys
from llmserve.gateway.main import main
from llmserve.gateway.readiness import Readiness
from llmserve.manifests.schema import ApiKey


def test_a_key_names_its_tenant() -> None:
    keys = ApiKeys(["plain", ApiKey(key="k2", tenant="acme")])
    assert keys.tenant_of({b"authorization": b"Bearer k2"}) == "acme"
    assert keys.tenant_of({b"authorization": b"bearer plain"}) == "default"
    assert keys.tenant_of({b"x-api-key": b"k2"}) == "acme"
    assert keys.tenant_of({}) is None


def test_without_keys_everyone_is_the_default_tenant() -> None:
    assert ApiKeys([]).tenant_of({b"x-tenant": b"acme"}) == "default"


def test_keys_are_not_kept_in_memory() -> None:
    assert b"very-secret" not in repr(vars(ApiKeys(["very-secret"]))).encode()


def test_a_silent_member_is_not_alive() -> None:
    now = 0.0
    readiness = Readiness([Role.BOTH], clock_s=lambda: now)
    readiness.hear(Heartbeat(member="w", role=Role.BOTH, host="h", pid=1))
    assert readiness.missing() == ""
    now = 3.5
    assert "both" in readiness.missing()


@pytest.mark.parametrize(
    ("fields", "mode"),
    [
        ({}, Mode.RESUME),
        ({"temperature": 0, "logprobs": 2, "stop_token_ids": [3]}, Mode.RESUME),
        ({"logit_bias": {1: 2.0}, "allowed_token_ids": [1, 2], "min_p": 0.1}, Mode.RESUME),
        ({"temperature": 0, "frequency_penalty": 0.5}, Mode.REPLAY),
        ({"seed": 0}, Mode.REPLAY),
        ({"temperature": 0, "min_tokens": 3}, Mode.REPLAY),
        ({"repetition_penalty": 1.1}, Mode.ONCE),
        ({"bad_words": ["no"]}, Mode.ONCE),
        ({"thinking_token_budget": 9}, Mode.ONCE),
        ({"extra_args": {"my_processor": 1}}, Mode.ONCE),
    ],
)
def test_a_further_attempt_does_what_the_sampling_allows(fields: dict[str, object], mode: Mode) -> None:
    from vllm.sampling_params import SamplingParams

    from llmserve.gateway.vllm_codec import mode_of

    assert mode_of(SamplingParams(**fields)) is mode


@pytest.mark.parametrize(
    "fields",
    [{"repetition_penalty": 1.1}, {"bad_words": ["no"]}, {"min_tokens": 3}],
)
def test_random_sampling_with_state_gets_a_seed_and_can_be_replayed(fields: dict[str, Any]) -> None:
    from vllm.sampling_params import SamplingParams

    from llmserve.gateway.vllm_codec import mode_of, repeatable

    first, second = (repeatable(SamplingParams(**fields)) for _ in range(2))
    assert mode_of(first) is Mode.REPLAY
    assert first.seed != second.seed


@pytest.mark.parametrize("fields", [{}, {"seed": 5, "bad_words": ["no"]}, {"extra_args": {"my_processor": 1}}])
def test_other_sampling_is_left_as_it_is(fields: dict[str, Any]) -> None:
    from vllm.sampling_params import SamplingParams

    from llmserve.gateway.vllm_codec import repeatable

    assert repeatable(SamplingParams(**fields)) == SamplingParams(**fields)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--manifest", "/nowhere.yaml"], "/nowhere.yaml"),
        (["--manifest", "{}", "--port", "70000"], "--port: 70000"),
        (["--manifest", "{}", "--host", "0.0.0.0"], "api_keys"),
        (["--manifest", "{}"], "no bus"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    path = tmp_path / "m.yaml"
    path.write_text(
        "apiVersion: v1\nkind: LLMServe\nmetadata: {name: t}\nspec: {models: {primary: {id: smollm2-135m}}}\n"
    )
    assert main([argument.format(path) for argument in arguments]) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("llmserve-gateway: ")]
    assert len(lines) == 1
    assert says in lines[0]
    assert "Traceback" not in error
