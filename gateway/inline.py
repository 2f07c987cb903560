"""Small prompts are rendered where they come up: a change of threads, and each task that waits for one, costs more
than a chat template or a short prompt."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.inputs import TextPrompt, TokensPrompt
    from vllm.renderers import BaseRenderer
    from vllm.renderers.params import TokenizeParams

INLINE_BYTES = 4096
"""Longest request body whose template and tokenization, below a millisecond, may hold up the event loop."""

small_request: ContextVar[bool] = ContextVar("llmserve_small_request", default=False)
"""Whether the work at hand belongs to a request of at most ``INLINE_BYTES``."""


def render_small_inline(renderer: BaseRenderer) -> None:
    """Have the renderer of a text model do the work of small requests by its own methods that do not wait."""
    later_chat, later_completion = renderer.render_chat_async, renderer.render_cmpl_async

    async def render_chat(*arguments: Any, **options: Any) -> Any:
        if small_request.get():
            return renderer.render_chat(*arguments, **options)
        return await later_chat(*arguments, **options)

    async def render_completion(*arguments: Any, **options: Any) -> Any:
        if small_request.get():
            return renderer.render_cmpl(*arguments, **options)
        return await later_completion(*arguments, **options)

    renderer.render_chat_async, renderer.render_cmpl_async = render_chat, render_completion
    if is_plain(renderer.tokenizer):
        # The methods that wait were bound to the other one.
        renderer._tokenize_prompt = _straight(renderer)


def _straight(renderer: BaseRenderer) -> Any:
    """Stands in for ``BaseRenderer._tokenize_prompt``: without the code around the tokenizer, which takes half as
    long as the tokenizer itself, and without the positions of tokens in the text."""
    tokenizer, around = renderer.tokenizer._tokenizer, renderer._tokenize_prompt

    def tokenize(prompt: TextPrompt, params: TokenizeParams) -> TokensPrompt:
        options = params.get_encode_kwargs()
        if params.return_token_offsets:
            return around(prompt, params)
        (encoding,) = tokenizer.encode_batch_fast(
            [prompt["prompt"]], add_special_tokens=options["add_special_tokens"]
        )
        token_ids = encoding.ids
        if options["truncation"] and len(token_ids) > options["max_length"]:
            return around(prompt, params)
        return renderer._build_tokens_prompt(token_ids, prompt)

    return tokenize


def is_plain(tokenizer: Any) -> bool:
    """Whether calling ``tokenizer`` without options is what its core does, nothing else."""
    from transformers import TokenizersBackend

    if not isinstance(tokenizer, TokenizersBackend):
        return False
    if type(tokenizer)._encode_plus is not TokenizersBackend._encode_plus:
        return False
    core = tokenizer._tokenizer
    splits = core.encode_special_tokens == tokenizer.split_special_tokens
    return core.truncation is None and core.padding is None and splits
