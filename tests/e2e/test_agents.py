"""The basic loop of OpenAI's agents SDK: the model calls a tool, gets its result, and answers."""

from __future__ import annotations

import agents
import pytest
from openai import AsyncOpenAI

from tests.processes import Stack

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("api", ["chat_completions", "responses"])
async def test_a_tool_is_called_and_the_model_answers(pd: Stack, api: str, streamed: bool) -> None:
    called: list[str] = []

    @agents.function_tool
    def get_weather(city: str) -> str:
        """The weather in a city."""
        called.append(city)
        return f"It is sunny in {city}."

    client = AsyncOpenAI(base_url=f"{pd.url}/v1", api_key="none", timeout=60, max_retries=0)
    model: agents.Model
    if api == "chat_completions":
        model = agents.OpenAIChatCompletionsModel(model=pd.model, openai_client=client)
    else:
        model = agents.OpenAIResponsesModel(model=pd.model, openai_client=client)
    agent = agents.Agent(
        name="weather",
        instructions="Use the tool.",
        model=model,
        tools=[get_weather],
        model_settings=agents.ModelSettings(temperature=0, max_tokens=64, tool_choice="get_weather"),
    )
    config = agents.RunConfig(tracing_disabled=True)
    if streamed:
        run = agents.Runner.run_streamed(agent, "What is the weather in Paris?", max_turns=4, run_config=config)
        async for _ in run.stream_events():
            pass
        output = run.final_output
    else:
        output = (await agents.Runner.run(agent, "What is the weather in Paris?", run_config=config)).final_output
    assert called
    assert output
