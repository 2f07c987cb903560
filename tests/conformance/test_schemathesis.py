"""schemathesis sends what our OpenAPI document allows, and what it does not; nothing may be a server error.

``CONFORMANCE_EXAMPLES`` is the number of cases for each operation.
"""

from __future__ import annotations

import gc
import os
import unittest
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.core.result import Ok

from tests.conformance.conftest import KEY
from tests.processes import Stack

EXAMPLES = int(os.environ.get("CONFORMANCE_EXAMPLES", "6"))


@pytest.fixture
def no_collector() -> Iterator[None]:
    """pytest parses parts of schemathesis as they are imported, amid the test. If the collector then ends a task that
    another test left, CPython 3.11 fails with "AST constructor recursion depth mismatch"."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_no_answer_is_a_server_error_and_errors_are_openais(
    sim: Stack, document: dict[str, object], mode: GenerationMode
) -> None:
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=sim.url)
    failures: list[str] = []
    slow: list[str] = []
    impossible: list[str] = []
    tried: set[str] = set()

    def answer(case: schemathesis.Case[Any]) -> None:
        tried.add(case.operation.label)
        try:
            response = case.call(headers={"authorization": f"Bearer {KEY}"}, timeout=10)
        except requests.ReadTimeout:
            slow.append(f"{case.operation.label} {case.body!r:.300}")
            return
        where = f"{case.operation.label} {case.body!r:.300}: {response.status_code} {response.text[:200]}"
        if response.status_code >= 500:
            failures.append(where)
        elif response.status_code >= 400 and "error" not in response.json():
            failures.append(f"{where} has another shape than OpenAI's errors")

    run = settings(
        max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
    )
    for found in schema.get_all_operations():
        assert isinstance(found, Ok)
        operation = found.ok()
        if mode is GenerationMode.NEGATIVE and operation.method.upper() == "GET":
            continue  # without a body or parameters there is nothing to get wrong
        try:
            run(given(case=operation.as_strategy(generation_mode=mode))(answer))()
        except (Unsatisfiable, unittest.SkipTest):
            impossible.append(operation.label)
    # Many choices of many tokens take their time; that they are asked for is no error.
    print("slower than 10 s:", *slow, "cannot be made wrong:", *impossible, sep="\n")
    assert not failures, "\n".join(failures)
    assert len(tried) >= 8
