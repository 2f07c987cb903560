"""LangChain's standard tests of chat models, against the real stack, by its OpenAI integration.

It takes four minutes on two cores, so it runs where ``CONFORMANCE_LANGCHAIN`` is set.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests

from tests.processes import Stack

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif("CONFORMANCE_LANGCHAIN" not in os.environ, reason="four minutes; set CONFORMANCE_LANGCHAIN=1"),
]

CUT = "the 135M model does not finish its call within max_tokens"
FAILS = {
    "test_tool_choice": CUT,
    "test_tool_calling_with_no_arguments": CUT,
    "test_structured_output_optional_param": CUT,
    "test_unicode_tool_call_integration": CUT,
    "test_structured_output_pydantic_2_v1": "nothing is parsed from what the model writes; cause not looked into",
    "test_agent_loop": "the 135M model does not call a tool that it may leave",
}
"""Seen once, at 48 tokens; not compared with vLLM's own server at the same settings."""


class TestChatModel(ChatModelIntegrationTests):
    @pytest.fixture(autouse=True, scope="class")
    def _stack(self, pd: Stack, request: pytest.FixtureRequest) -> None:
        request.cls.stack = pd

    @pytest.fixture(autouse=True)
    def _known(self, request: pytest.FixtureRequest) -> None:
        reason = FAILS.get(request.node.originalname)
        if reason is not None:
            request.applymarker(pytest.mark.xfail(strict=True, reason=reason))

    stack: Stack

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {
            "model": self.stack.model,
            "base_url": f"{self.stack.url}/v1",
            "api_key": "none",
            "temperature": 0,
            "max_tokens": 48,
            "timeout": 60,
            "max_retries": 0,
            "stream_usage": True,
        }
