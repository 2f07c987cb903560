"""Inputs that vLLM's renderer stumbles over are the client's error; the server's, by vLLM's own handling."""

from __future__ import annotations

import functools
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from vllm.exceptions import VLLMValidationError

log = logging.getLogger(__name__)

_STUMBLES = (AssertionError, AttributeError, IndexError, KeyError, TypeError)
"""What reading an input of an unexpected shape raises."""
_RENDERS = ("render_chat", "render_completion", "render_responses", "preprocess_chat")

Render = Callable[..., Awaitable[Any]]


def refuse_unreadable(renderer: Any) -> None:
    """Have vLLM's ``OnlineRenderer`` raise ``VLLMValidationError`` for them."""
    for name in _RENDERS:
        setattr(renderer, name, _refusing(getattr(renderer, name)))


def _refusing(render: Render) -> Render:
    @functools.wraps(render)
    async def refusing(*arguments: Any, **options: Any) -> Any:
        try:
            return await render(*arguments, **options)
        except _STUMBLES as error:
            log.warning("an input cannot be rendered: %r", error, exc_info=log.isEnabledFor(logging.DEBUG))
            raise VLLMValidationError("The input has a part that cannot be read", parameter="input") from error

    return refusing
