"""What is changed in, or refused of, a request that vLLM has validated and would take as it is."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

from vllm.exceptions import VLLMValidationError

from llmserve.gateway.caller import BATCH, current_caller
from llmserve.gateway.response_input import readable

if TYPE_CHECKING:
    from fastapi import FastAPI

REMOVED_FIELDS = (
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "guided_decoding_backend",
    "guided_whitespace_pattern",
)
"""Of older versions of vLLM. vLLM ignores them, and answers without the constraint that the client relies on."""

OWN_FIELDS = ("kv_transfer_params", "ec_transfer_params")
"""Of what engines tell each other. The codec refuses them too, but of a response only when its stream has begun."""

BATCH_TIERS = ("flex", "batch")
TIERS = ("auto", "default", "flex", "batch", "scale", "priority")

_LOGPROBS_OF_A_RESPONSE = "message.output_text.logprobs"

Create = Callable[..., Awaitable[Any]]
_END = "}\n\n"
"""Of an event."""


def install_adjustments(app: FastAPI, simulated: bool) -> None:
    """For every route that generates; ``simulated``: the workers' engines are."""
    state = app.state
    for serving, name in (
        (state.openai_serving_chat, "create_chat_completion"),
        (state.openai_serving_completion, "create_completion"),
        (state.openai_serving_responses, "create_responses"),
    ):
        setattr(serving, name, _adjusted(getattr(serving, name), simulated))


def adjust(request: Any, simulated: bool) -> str | None:
    """Change ``request`` and note its class with the caller; the service tier to tell, if one was asked for.

    Raises ``VLLMValidationError``.
    """
    extra = request.model_extra or {}
    if removed := [name for name in REMOVED_FIELDS if extra.get(name) is not None]:
        hint = "use structured_outputs or response_format"
        raise VLLMValidationError(f"{', '.join(removed)} is not supported: {hint}", parameter=removed[0])
    for name in OWN_FIELDS:
        if getattr(request, name, extra.get(name)) is not None:
            raise VLLMValidationError(f"{name} is not supported by this deployment", parameter=name)
    if simulated and (named := _needs_logprobs(request)):
        raise VLLMValidationError(f"{named}: simulated engines yield no log probabilities", parameter=named)
    tier = _choose_class(extra.get("service_tier", getattr(request, "service_tier", None)))
    if isinstance(items := getattr(request, "input", None), list):
        request.input = readable(items)
    if _is_forced(getattr(request, "tool_choice", None)):
        _pin_arguments(request.tools or ())
    if "service_tier" not in request.model_fields_set:
        return None
    request.service_tier = tier  # vLLM's responses and the fast lane tell what they were asked for
    return tier


def _adjusted(create: Create, simulated: bool) -> Create:
    @functools.wraps(create)
    async def adjusted(request: Any, *arguments: Any, **options: Any) -> Any:
        tier = adjust(request, simulated)
        made = await create(request, *arguments, **options)
        if tier is not None and inspect.isasyncgen(made):
            return _told(made, tier)
        if tier is not None and hasattr(made, "service_tier"):
            made.service_tier = tier
        return made

    return adjusted


async def _told(events: AsyncIterator[Any], tier: str) -> AsyncIterator[str]:
    """A stream whose chunks of chats, which have no such field with vLLM, say the tier."""
    async for event in events:
        is_chunk = '"object":"chat.completion.chunk"' in event
        yield event.removesuffix(_END) + f',"service_tier":"{tier}"{_END}' if is_chunk else event


def _needs_logprobs(request: Any) -> str | None:
    """The field of ``request`` that asks for them, if any; the number 0 asks for those of the sampled tokens."""
    for name in ("logprobs", "prompt_logprobs", "use_beam_search"):
        value = getattr(request, name, None)
        if value is not None and value is not False:
            return name
    return "include" if _LOGPROBS_OF_A_RESPONSE in (getattr(request, "include", None) or ()) else None


def _choose_class(tier: object) -> str:
    """Note the class with the caller; as which tier, of OpenAI's, the request is served."""
    if tier is not None and tier not in TIERS:
        raise VLLMValidationError(f"service_tier must be one of {', '.join(TIERS)}", parameter="service_tier")
    caller = current_caller.get()
    if caller is not None and tier in BATCH_TIERS:
        caller.klass = BATCH
    return "flex" if tier in BATCH_TIERS or (caller is not None and caller.klass == BATCH) else "default"


def _is_forced(tool_choice: Any) -> bool:
    return tool_choice is not None and tool_choice not in ("none", "auto")


def _pin_arguments(tools: Any) -> None:
    """Have a forced call's arguments follow the tool's schema.

    vLLM constrains them only of a tool that says ``strict``; of any other a model may write a string where the object
    belongs. A schema that the grammar's compiler does not know stays as it is.
    """
    for tool in tools:
        function = getattr(tool, "function", tool)
        if getattr(function, "strict", False) is None and _compiles(function.parameters):
            function.strict = True


def _compiles(schema: Any) -> bool:
    import xgrammar

    if not schema:
        return False
    try:
        xgrammar.Grammar.from_json_schema(json.dumps(schema))
    except (RuntimeError, ValueError, TypeError):
        return False
    return True
