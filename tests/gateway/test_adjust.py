"""What the gateway adds to, or refuses of, requests that vLLM's server takes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.exceptions import VLLMValidationError

from llmserve.gateway.adjust import adjust
from tests.gateway.conftest import World
from tests.gateway.test_api import CHAT, TEXT

COMPLETION = {"model": "smol", "prompt": "x"}
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETION,
    "/v1/responses": {"model": "smol", "input": "x"},
}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 9}}, "required": ["city"]}
FUNCTION = {"name": "get_weather", "parameters": SCHEMA}
NAMED = {"type": "function", "function": {"name": "get_weather"}}


def accepted(world: World) -> Any:
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.serial_utils import MsgpackDecoder

    return MsgpackDecoder(EngineCoreRequest).decode(world.bus.accepted[-1].request.body)


def sampling_params(world: World) -> Any:
    return accepted(world).sampling_params


def prompt(world: World) -> list[int]:
    ids: list[int] = accepted(world).prompt_token_ids
    return ids


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("url", ROUTES)
async def test_constraints_that_vllm_would_ignore_are_refused_by_name(world: World, url: str, stream: bool) -> None:
    for field, value in {
        "guided_choice": ["a"],
        "guided_regex": "a+",
        "guided_json": {},
        "guided_grammar": "x",
    }.items():
        response = await world.client.post(url, json={**ROUTES[url], field: value, "stream": stream})
        error = response.json()["error"]
        assert (response.status_code, error["param"], field in error["message"]) == (400, field, True)
    assert world.bus.accepted == []


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("url", ["/v1/chat/completions", "/v1/completions"])
async def test_the_service_tier_decides_the_class(world: World, url: str, stream: bool) -> None:
    world.yields(TEXT)
    wanted = {"flex": "batch", "batch": "batch", "auto": "interactive", "default": "interactive", None: "interactive"}
    for tier in wanted:
        body = {**ROUTES[url], "max_tokens": 2, "service_tier": tier, "stream": stream}
        assert (await world.client.post(url, json=body)).status_code == 200
    assert [stored.klass for stored in world.bus.accepted] == list(wanted.values())


@pytest.mark.parametrize("url", ROUTES)
async def test_an_answer_tells_the_tier_that_it_was_served_as(world: World, url: str) -> None:
    world.yields(TEXT)
    told = {"flex": "flex", "auto": "default", "default": "default", "priority": "default"}
    if url != "/v1/responses":  # where OpenAI's own words are the only ones
        told["batch"] = "flex"
    for asked, said in told.items():
        response = await world.client.post(url, json={**ROUTES[url], "service_tier": asked})
        assert (response.status_code, response.json().get("service_tier")) == (200, said), asked
    unasked = (await world.client.post(url, json=ROUTES[url])).json()["service_tier"]
    assert unasked == ("auto" if url == "/v1/responses" else None)


@pytest.mark.parametrize("others", [{}, {"return_token_ids": True}], ids=["fast lane", "vLLM's path"])
async def test_so_does_every_chunk_of_a_streamed_chat(world: World, others: dict[str, Any]) -> None:
    world.yields(TEXT)
    usage = {"stream_options": {"include_usage": True}}
    told: dict[str, dict[str, str]] = {"flex": {"service_tier": "flex"}, "auto": {"service_tier": "default"}, "": {}}
    for asked, said in told.items():
        body = {**CHAT, **others, **usage, "stream": True, **({"service_tier": asked} if asked else {})}
        response = await world.client.post("/v1/chat/completions", json=body)
        chunks = [json.loads(event[6:]) for event in response.text.split("\n\n") if event.startswith("data: {")]
        assert len(chunks) > 3
        for chunk in chunks:
            assert {name: value for name, value in chunk.items() if name == "service_tier"} == said


async def test_responses_have_service_tiers_too(world: World) -> None:
    world.yields(TEXT)
    response = await world.client.post("/v1/responses", json={"model": "smol", "input": "x", "service_tier": "flex"})
    assert response.status_code == 200
    assert world.bus.accepted[0].klass == "batch"


async def test_an_unknown_service_tier_is_400(world: World) -> None:
    response = await world.client.post("/v1/chat/completions", json={**CHAT, "service_tier": "gold"})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "service_tier")
    assert "flex" in error["message"]


@pytest.mark.parametrize("choice", ["required", NAMED])
async def test_forced_calls_follow_the_schema_of_their_arguments(world: World, choice: Any) -> None:
    world.yields(TEXT)
    tools = [{"type": "function", "function": FUNCTION}]
    await world.client.post("/v1/chat/completions", json={**CHAT, "tools": tools, "tool_choice": choice})
    tag = json.loads(sampling_params(world).structured_outputs.structural_tag)
    assert '"maxLength": 9' in json.dumps(tag)


async def test_a_client_that_says_not_strict_is_obeyed_and_free_calls_stay_free(world: World) -> None:
    world.yields(TEXT)
    loose = [{"type": "function", "function": {**FUNCTION, "strict": False}}]
    await world.client.post("/v1/chat/completions", json={**CHAT, "tools": loose, "tool_choice": "required"})
    assert "maxLength" not in sampling_params(world).structured_outputs.structural_tag
    tools = [{"type": "function", "function": FUNCTION}]
    await world.client.post("/v1/chat/completions", json={**CHAT, "tools": tools})
    assert sampling_params(world).structured_outputs is None


async def test_a_schema_that_no_grammar_can_follow_does_not_fail_the_request(world: World) -> None:
    world.yields(TEXT)
    odd = {"type": "object", "properties": {"a": {"type": "no such type"}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": odd}}]
    body = {**CHAT, "tools": tools, "tool_choice": "required"}
    assert (await world.client.post("/v1/chat/completions", json=body)).status_code == 200


async def test_what_the_model_cannot_do_is_refused_by_name(world: World) -> None:
    response = await world.client.post("/v1/embeddings", json={"model": "smol", "input": "x"})
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (404, "NotFoundError")
    assert "embeddings" in error["message"]


@pytest.mark.parametrize(
    ("field", "asked"),
    [
        ("logprobs", ChatCompletionRequest(messages=[], logprobs=True)),
        ("logprobs", CompletionRequest(prompt="x", logprobs=0)),
        ("prompt_logprobs", CompletionRequest(prompt="x", prompt_logprobs=0)),
        ("use_beam_search", ChatCompletionRequest(messages=[], use_beam_search=True)),
        ("include", ResponsesRequest(input="x", include=["message.output_text.logprobs"])),
    ],
)
def test_what_needs_log_probabilities_is_refused_by_name_where_the_engines_are_simulated(
    field: str, asked: Any
) -> None:
    with pytest.raises(VLLMValidationError, match=f"^{field}: simulated"):
        adjust(asked, simulated=True)
    adjust(asked, simulated=False)


@pytest.mark.parametrize(
    "asked", [ChatCompletionRequest(messages=[]), CompletionRequest(prompt="x"), ResponsesRequest(input="x")]
)
def test_simulated_engines_take_what_needs_none(asked: Any) -> None:
    adjust(asked, simulated=True)


TOLD = {"type": "output_text", "text": "Yes. ", "annotations": []}
MORE = {"type": "output_text", "text": "It is Paris.", "annotations": []}
REFUSED = {"type": "refusal", "refusal": "I cannot say."}
OUTPUT = {"type": "message", "id": "m1", "status": "completed"}
GIVEN = [{"type": "input_text", "text": "Yes. "}, {"type": "input_text", "text": "No."}]


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({**OUTPUT, "content": [TOLD]}, "Yes. "),
        ({**OUTPUT, "content": [TOLD, MORE]}, "Yes. It is Paris."),
        ({**OUTPUT, "content": [REFUSED]}, "I cannot say."),
        ({**OUTPUT, "content": [TOLD, REFUSED]}, "Yes. I cannot say."),
        ({**OUTPUT, "content": []}, ""),
        ({"content": GIVEN}, "Yes. No."),
    ],
)
async def test_an_assistants_message_counts_with_all_its_parts_refusals_included(
    world: World, message: dict[str, Any], text: str
) -> None:
    world.yields(TEXT)
    sent: list[list[int]] = []
    for said in (message, {"content": text}):
        talk = [{"role": "user", "content": "x"}, {**said, "role": "assistant"}, {"role": "user", "content": "y"}]
        response = await world.client.post("/v1/responses", json={"model": "smol", "input": talk})
        assert response.status_code == 200, response.text
        sent.append(prompt(world))
    assert sent[0] == sent[1]


@pytest.mark.parametrize("more", [{}, {"id": "o1", "status": "completed"}])
async def test_a_tools_output_may_be_a_list_of_texts(world: World, more: dict[str, str]) -> None:
    world.yields(TEXT)
    output = {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "Sunny."}]}
    call = {"type": "function_call", "call_id": "c", "name": "get_weather", "arguments": "{}"}
    response = await world.client.post("/v1/responses", json={"model": "smol", "input": [call, {**output, **more}]})
    assert response.status_code == 200, response.text
