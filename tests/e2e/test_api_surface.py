"""What vLLM's server offers for a text model, through the bus and over a handoff between two engines."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import openai
import pytest

from tests.processes import Stack

pytestmark = pytest.mark.vllm

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "description": "Weather", "parameters": SCHEMA}}
]
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}
ASK: Any = [{"role": "user", "content": "What is the weather in Paris? Use the tool."}]
CALL = r'<tool_call>\n\{"name": "get_weather", "arguments": \{"city": "[A-Z][a-z]{2,6}"\}\}\n</tool_call>'
"""Brings a model of this size to call a tool of its own accord."""


def arguments_of(call: Any) -> dict[str, str]:
    assert call.function.name == "get_weather"
    arguments = json.loads(call.function.arguments)
    assert isinstance(arguments, dict)
    assert list(arguments) == ["city"]
    return arguments


# -- tools ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_forced_tool_is_called_with_an_object(client: openai.OpenAI, pd: Stack, choice: Any, stream: bool) -> None:
    asked: dict[str, Any] = {
        "model": pd.model,
        "messages": ASK,
        "tools": TOOLS,
        "tool_choice": choice,
        "temperature": 0,
        "max_tokens": 60,
    }
    if not stream:
        answer = client.chat.completions.create(**asked)
        (call,) = answer.choices[0].message.tool_calls or []
        assert arguments_of(call)
        return
    name, arguments, finish, pieces = "", "", None, 0
    for chunk in client.chat.completions.create(**asked, stream=True):
        choice_of_chunk = chunk.choices[0]
        finish = choice_of_chunk.finish_reason or finish
        for part in choice_of_chunk.delta.tool_calls or []:
            assert part.function is not None
            name += part.function.name or ""
            arguments += part.function.arguments or ""
            pieces += bool(part.function.arguments)
    assert (name, list(json.loads(arguments)), pieces > 1) == ("get_weather", ["city"], True)
    assert finish == ("tool_calls" if choice == "required" else "stop")


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_called_freely(client: openai.OpenAI, pd: Stack, stream: bool) -> None:
    asked: dict[str, Any] = {
        "model": pd.model,
        "messages": ASK,
        "tools": TOOLS,
        "temperature": 0,
        "max_tokens": 60,
        "extra_body": {"structured_outputs": {"regex": CALL}},
    }
    if stream:
        parts = [
            part.function
            for chunk in client.chat.completions.create(**asked, stream=True)
            for part in chunk.choices[0].delta.tool_calls or []
        ]
        assert list(json.loads("".join(part.arguments or "" for part in parts if part))) == ["city"]
        return
    answer = client.chat.completions.create(**asked).choices[0]
    assert answer.finish_reason == "tool_calls"
    (call,) = answer.message.tool_calls or []
    assert arguments_of(call)


def test_no_tool_is_called_if_none_may_be(client: openai.OpenAI, pd: Stack) -> None:
    answer = client.chat.completions.create(
        model=pd.model, messages=ASK, tools=TOOLS, tool_choice="none", temperature=0, max_tokens=8
    )
    assert not answer.choices[0].message.tool_calls
    assert answer.choices[0].message.content


def test_responses_call_tools(client: openai.OpenAI, pd: Stack) -> None:
    tool: Any = {"type": "function", "name": "get_weather", "parameters": SCHEMA}
    answer = client.responses.create(
        model=pd.model,
        input="Weather in Paris?",
        tools=[tool],
        tool_choice="required",
        temperature=0,
        max_output_tokens=60,
    )
    (call,) = [item for item in answer.output if item.type == "function_call"]
    assert call.name == "get_weather"
    assert list(json.loads(call.arguments)) == ["city"]


# -- structured output ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        ({"choice": ["north", "south"]}, "north|south"),
        ({"regex": r"[A-Z]{3}-\d{2}"}, r"[A-Z]{3}-\d{2}"),
        ({"grammar": 'root ::= "up" | "down" " " root'}, "(down )*up"),
    ],
    ids=["choice", "regex", "grammar"],
)
def test_output_keeps_to_its_constraint(
    client: openai.OpenAI, pd: Stack, constraint: dict[str, Any], pattern: str
) -> None:
    answer = client.completions.create(
        model=pd.model,
        prompt="The answer is",
        max_tokens=24,
        temperature=0,
        extra_body={"structured_outputs": constraint},
    )
    assert re.fullmatch(pattern, answer.choices[0].text), answer.choices[0].text


def test_a_json_object_is_one(client: openai.OpenAI, pd: Stack) -> None:
    answer = client.chat.completions.create(
        model=pd.model,
        messages=[{"role": "user", "content": 'Reply with {"a": 1} and nothing else.'}],
        response_format={"type": "json_object"},
        temperature=0,
        max_tokens=24,
    )
    text = answer.choices[0].message.content or ""
    assert text.lstrip().startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


# -- the rest -------------------------------------------------------------------------------------------------------


def test_responses_stream_every_event_in_order(client: openai.OpenAI, pd: Stack) -> None:
    events = list(
        client.responses.create(model=pd.model, input="Say hi.", max_output_tokens=6, temperature=0, stream=True)
    )
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_responses_stream_the_arguments_of_a_call(client: openai.OpenAI, pd: Stack) -> None:
    tool: Any = {"type": "function", "name": "get_weather", "parameters": SCHEMA}
    events = list(
        client.responses.create(
            model=pd.model,
            input="Weather in Paris?",
            tools=[tool],
            tool_choice="required",
            temperature=0,
            max_output_tokens=60,
            stream=True,
        )
    )
    pieces = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    (whole,) = [event.arguments for event in events if event.type == "response.function_call_arguments.done"]
    assert len(pieces) > 1
    assert "".join(pieces) == whole
    assert list(json.loads(whole)) == ["city"]


def test_batch_class_work_is_done_when_there_is_room(client: openai.OpenAI, pd: Stack) -> None:
    answer = client.chat.completions.create(model=pd.model, messages=ASK, max_tokens=2, service_tier="flex")
    assert (answer.choices[0].finish_reason, answer.service_tier) == ("length", "flex")


def test_tokens_are_made_and_unmade(pd: Stack) -> None:
    with httpx.Client(base_url=pd.url, timeout=30) as http:
        made = http.post("/tokenize", json={"model": pd.model, "prompt": "Hello there"}).json()
        assert made["count"] == len(made["tokens"]) > 0
        body = {"model": pd.model, "tokens": made["tokens"]}
        assert http.post("/detokenize", json=body).json()["prompt"] == "Hello there"


def test_embeddings_are_refused_by_name(client: openai.OpenAI, pd: Stack) -> None:
    with pytest.raises(openai.NotFoundError, match="does not support embeddings"):
        client.embeddings.create(model=pd.model, input="x")
