"""A stock OpenAI client against the real stack: one engine prefills, another decodes."""

from __future__ import annotations

import json

import openai
import pytest

from tests.processes import Stack

pytestmark = pytest.mark.vllm

LONG = "You are terse. " * 60


def question(text: str) -> list[openai.types.chat.ChatCompletionMessageParam]:
    return [{"role": "system", "content": LONG}, {"role": "user", "content": text}]


def test_a_chat_is_answered(client: openai.OpenAI, pd: Stack) -> None:
    answer = client.chat.completions.create(
        model=pd.model, messages=question("What is the capital of France?"), temperature=0, max_tokens=24
    )
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 24


def test_a_stream_adds_up_to_the_whole_answer_and_ends_with_its_usage(client: openai.OpenAI, pd: Stack) -> None:
    def ask_whole() -> openai.types.chat.ChatCompletion:
        return client.chat.completions.create(
            model=pd.model, messages=question("Name three fruits."), temperature=0, max_tokens=32
        )

    ask_whole()  # from now on the prompt is cached, so that the counts of cached tokens can be compared
    whole = ask_whole()
    chunks = list(
        client.chat.completions.create(
            model=pd.model,
            messages=question("Name three fruits."),
            temperature=0,
            max_tokens=32,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert len(chunks) > 5
    assert whole.usage is not None
    assert whole.usage.prompt_tokens_details is not None
    assert whole.usage.prompt_tokens_details.cached_tokens
    assert chunks[-1].usage is not None
    # vLLM writes absent fields as null in whole answers and leaves them out of streams.
    assert chunks[-1].usage.model_dump(exclude_none=True) == whole.usage.model_dump(exclude_none=True)


def test_completions_take_text_and_token_ids(client: openai.OpenAI, pd: Stack) -> None:
    for prompt in ("The quick brown fox", [1000, 2000, 3000, 4000]):
        answer = client.completions.create(model=pd.model, prompt=prompt, max_tokens=8, temperature=0)
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 8


def test_n_answers_come_from_one_request(client: openai.OpenAI, pd: Stack) -> None:
    answer = client.chat.completions.create(
        model=pd.model, messages=question("Say a word."), n=3, temperature=1.0, max_tokens=12
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) > 1


def test_the_same_seed_gives_the_same_answer(client: openai.OpenAI, pd: Stack) -> None:
    answers = {
        client.chat.completions.create(
            model=pd.model, messages=question("Tell me a story."), seed=11, temperature=1.0, max_tokens=20
        )
        .choices[0]
        .message.content
        for _ in range(2)
    }
    assert len(answers) == 1


def test_logprobs_cover_every_token_from_the_first_on(client: openai.OpenAI, pd: Stack) -> None:
    answer = client.chat.completions.create(
        model=pd.model,
        messages=question("What is the capital of France?"),
        temperature=0,
        max_tokens=10,
        logprobs=True,
        top_logprobs=2,
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert answer.usage is not None
    # The end-of-sequence token has a logprob too, but no text.
    assert "".join(token.token for token in logprobs.content).startswith(answer.choices[0].message.content or "?")
    assert all(len(token.top_logprobs) == 2 for token in logprobs.content)
    assert len(logprobs.content) == answer.usage.completion_tokens


def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(client: openai.OpenAI, pd: Stack) -> None:
    answer = client.chat.completions.create(
        model=pd.model,
        messages=question("What is the capital of France?"),
        temperature=0,
        max_tokens=24,
        stop=["Paris"],
    )
    assert answer.choices[0].finish_reason == "stop"
    assert "Paris" not in (answer.choices[0].message.content or "")


def test_penalties_change_a_repetitive_answer(client: openai.OpenAI, pd: Stack) -> None:
    def answer(penalty: float) -> str:
        return (
            client.completions.create(
                model=pd.model,
                prompt="a b a b a b a b a b a b",
                temperature=0,
                max_tokens=24,
                frequency_penalty=penalty,
            )
            .choices[0]
            .text
        )

    assert answer(0.0) != answer(2.0)


def test_structured_output_follows_its_schema(client: openai.OpenAI, pd: Stack) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}},
        "required": ["city"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=pd.model,
        messages=question("What is the capital of France? Answer in JSON."),
        temperature=0,
        max_tokens=40,
        response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
    )
    assert list(json.loads(answer.choices[0].message.content or "")) == ["city"]


def test_responses_are_served_and_stream(client: openai.OpenAI, pd: Stack) -> None:
    whole = client.responses.create(model=pd.model, input="Say hi.", max_output_tokens=16, temperature=0)
    assert whole.output_text
    events = list(
        client.responses.create(model=pd.model, input="Say hi.", max_output_tokens=16, temperature=0, stream=True)
    )
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text


def test_models_are_listed(client: openai.OpenAI, pd: Stack) -> None:
    assert [model.id for model in client.models.list()] == [pd.model]
    assert client.models.retrieve(pd.model).id == pd.model


def test_a_prompt_that_is_too_long_is_a_bad_request(client: openai.OpenAI, pd: Stack) -> None:
    with pytest.raises(openai.BadRequestError, match=r"context length|too long|maximum"):
        client.completions.create(model=pd.model, prompt=[1000] * 3000, max_tokens=8)


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="nope"):
        client.completions.create(model="nope", prompt="x")
