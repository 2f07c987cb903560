"""From a chat of plain text to token ids, in one function: what vLLM's renderer makes of it over many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from llmserve.gateway.segments import Segments, cuts_cleanly

if TYPE_CHECKING:
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat

_BILLING = "x-anthropic-billing-header"
"""vLLM cuts a line that begins so off a system message."""


class PlainMessage(msgspec.Struct, forbid_unknown_fields=True):
    """One of a chat that is nothing but text."""

    role: Literal["system", "user", "assistant"]
    content: str


class PlainPrompts:
    """For chats that say nothing about their template. Held to vLLM 0.32."""

    def __init__(self, serving: OpenAIServingChat) -> None:
        from transformers.utils.chat_template_utils import _compile_jinja_template
        from vllm.renderers.hf import (
            resolve_chat_template,
            resolve_chat_template_content_format,
            resolve_chat_template_kwargs,
        )

        renderer, config = serving.renderer, serving.model_config
        tokenizer, template = renderer.tokenizer, serving.chat_template
        resolved = resolve_chat_template(tokenizer, chat_template=template, tools=None, model_config=config)
        content_format = resolve_chat_template_content_format(
            template, None, serving.chat_template_content_format, tokenizer, model_config=config
        )
        defaults = resolve_chat_template_kwargs(tokenizer, resolved, serving.default_chat_template_kwargs)
        self._render = _compile_jinja_template(tokenizer.get_chat_template(resolved)).render
        self._values = {
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
            **tokenizer.special_tokens_map,
            **defaults,
        }
        self._wraps = content_format == "openai"
        self._encode = _encoder(tokenizer._tokenizer)
        self._check = renderer.validate_token_ids
        self._max_chars = config.max_model_len * tokenizer.max_chars_per_token

    def tokens(self, messages: Sequence[PlainMessage]) -> list[int] | None:
        """None if vLLM would make something else of it, or refuse it."""
        if not messages or any(one.role == "system" and one.content.startswith(_BILLING) for one in messages):
            return None
        try:
            conversation = [{"role": one.role, "content": self._content(one.content)} for one in messages]
            text = self._render(messages=conversation, **self._values)
            token_ids = self._encode(text)
            self._check(token_ids)
        except Exception:
            # A template may raise anything: vLLM says what is wrong.
            return None
        return token_ids if len(text) <= self._max_chars else None

    def _content(self, text: str) -> Any:
        return [{"type": "text", "text": text}] if self._wraps else text


def _encoder(core: Any) -> Callable[[str], list[int]]:
    if cuts_cleanly(core):
        return Segments(core).encode

    def encode(text: str) -> list[int]:
        (encoding,) = core.encode_batch_fast([text], add_special_tokens=False)
        token_ids: list[int] = encoding.ids
        return token_ids

    return encode


def plain_prompts(serving: OpenAIServingChat) -> PlainPrompts | None:
    """None if the model's chats are made in another way than this module knows."""
    from vllm.renderers.hf import HfRenderer

    from llmserve.gateway.inline import is_plain

    renderer = serving.renderer
    if serving.online_renderer.use_harmony or type(renderer) is not HfRenderer or not is_plain(renderer.tokenizer):
        return None
    try:
        return PlainPrompts(serving)
    except Exception:
        # A model without a template.
        return None
