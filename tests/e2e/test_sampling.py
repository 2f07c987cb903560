"""Sampling, log probabilities and the cache, through the bus and over a handoff between two engines."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.processes import Stack

pytestmark = pytest.mark.vllm

PARIS = "The capital of France is"


def test_a_bias_decides_the_token_and_min_tokens_the_length(client: openai.OpenAI, pd: Stack) -> None:
    answer = client.completions.create(
        model=pd.model, prompt="Hi", max_tokens=3, logit_bias={"1000": 100}, logprobs=0
    )
    tokens = answer.choices[0].logprobs
    assert tokens is not None
    assert len(set(tokens.tokens or [])) == 1
    question: Any = [{"role": "user", "content": "What is 2+2? One word."}]
    asked: dict[str, Any] = {"model": pd.model, "messages": question, "temperature": 0, "max_tokens": 40}
    least = client.chat.completions.create(**asked, extra_body={"min_tokens": 30}).usage
    assert least is not None
    assert least.completion_tokens >= 30


def test_logprobs_of_the_prompt_are_those_of_generating_it(client: openai.OpenAI, pd: Stack) -> None:
    """They travel as tensors beside the first output; the prompt's last token was sampled a moment before."""
    prompt = PARIS
    made = client.completions.create(model=pd.model, prompt=prompt, max_tokens=1, temperature=0, logprobs=0).choices[
        0
    ]
    assert made.logprobs is not None
    assert made.logprobs.token_logprobs is not None
    read = client.completions.create(
        model=pd.model, prompt=prompt + made.text, max_tokens=1, temperature=0, echo=True, logprobs=0
    ).choices[0]
    assert read.text.startswith(prompt + made.text)
    assert read.logprobs is not None
    assert read.logprobs.token_logprobs is not None
    assert read.logprobs.token_logprobs[0] is None
    assert read.logprobs.token_logprobs[-2] == pytest.approx(made.logprobs.token_logprobs[0], abs=0.1)


def test_prompt_logprobs_have_an_entry_for_each_token(client: openai.OpenAI, pd: Stack) -> None:
    answer = client.completions.create(
        model=pd.model, prompt=[1000, 2000, 3000, 4000], max_tokens=2, extra_body={"prompt_logprobs": 1}
    )
    entries = answer.choices[0].model_dump()["prompt_logprobs"]
    assert entries[0] is None
    assert [token in entry for token, entry in zip(["2000", "3000", "4000"], entries[1:], strict=True)] == [True] * 3


def test_streamed_logprobs_are_those_of_the_whole_answer(client: openai.OpenAI, pd: Stack) -> None:
    asked: dict[str, Any] = {"model": pd.model, "prompt": PARIS, "max_tokens": 6, "temperature": 0, "logprobs": 2}
    whole = client.completions.create(**asked).choices[0].logprobs
    parts = [chunk.choices[0].logprobs for chunk in client.completions.create(**asked, stream=True)]
    assert whole is not None
    assert [token for part in parts if part for token in part.tokens or []] == whole.tokens
    streamed = [value for part in parts if part for value in part.token_logprobs or []]
    assert streamed == pytest.approx(whole.token_logprobs or [], abs=0.1)


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_is_echoed_without_a_token_behind_it(client: openai.OpenAI, pd: Stack, stream: bool) -> None:
    asked: dict[str, Any] = {"model": pd.model, "prompt": PARIS, "max_tokens": 0, "echo": True}
    if stream:
        text = "".join(chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True))
        assert text == PARIS
        return
    answer = client.completions.create(**asked, logprobs=1).choices[0]
    assert answer.text == PARIS
    assert answer.logprobs is not None
    assert "".join(answer.logprobs.tokens or []) == PARIS
    values = answer.logprobs.token_logprobs or []
    assert values[0] is None
    assert all(value < 0 for value in values[1:])


def test_streamed_choices_are_told_apart(client: openai.OpenAI, pd: Stack) -> None:
    texts = {0: "", 1: ""}
    ends = set()
    for chunk in client.completions.create(
        model=pd.model, prompt=PARIS, max_tokens=8, n=2, seed=5, temperature=1.5, stream=True
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.finish_reason:
                ends.add(choice.index)
    assert ends == {0, 1}
    assert texts[0] != texts[1]


def test_the_best_beam_is_at_least_as_likely_as_the_greedy_answer(client: openai.OpenAI, pd: Stack) -> None:
    asked: dict[str, Any] = {"model": pd.model, "prompt": PARIS, "max_tokens": 4, "temperature": 0}
    beams = client.completions.create(**asked, n=2, extra_body={"use_beam_search": True}).choices
    assert len({beam.text for beam in beams}) == 2
    greedy = client.completions.create(**asked).choices[0]

    def likelihood(text: str) -> float:
        read = client.completions.create(model=pd.model, prompt=PARIS + text, max_tokens=0, echo=True, logprobs=0)
        logprobs = read.choices[0].logprobs
        assert logprobs is not None
        return sum(value or 0.0 for value in logprobs.token_logprobs or [])

    assert likelihood(beams[0].text) >= likelihood(greedy.text) - 0.2


# -- the cache ------------------------------------------------------------------------------------------------------


def test_usage_tells_cached_tokens_and_a_salt_divides_the_cache(client: openai.OpenAI, pd: Stack) -> None:
    prompt = [3000 + 7 * index % 4000 for index in range(400)]

    def cached(**extra: str) -> int:
        usage = client.completions.create(model=pd.model, prompt=prompt, max_tokens=2, extra_body=extra).usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        return usage.prompt_tokens_details.cached_tokens or 0

    assert (cached(), cached() > 0) == (0, True)
    assert (cached(cache_salt="mine"), cached(cache_salt="mine") > 0) == (0, True)
