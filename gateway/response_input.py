"""Items of a response's input that vLLM 0.32 reads in part only, or fails at.

Of an assistant's message it reads the first part, and fails at a refusal; a tool's output that comes with id and
status it reads as a text only.
"""

from __future__ import annotations

from typing import Any

from openai.types.responses import (
    ResponseFunctionToolCallOutputItem,
    ResponseOutputMessage,
    ResponseOutputText,
)


def readable(items: list[Any]) -> list[Any]:
    """``items`` with an assistant's message as one text, of all its parts, and a tool's output as plain objects."""
    return [_readable(item) for item in items]


def _readable(item: Any) -> Any:
    if isinstance(item, ResponseOutputMessage):
        texts = [part.refusal if part.type == "refusal" else part.text for part in item.content]
        text = ResponseOutputText(type="output_text", text="".join(texts), annotations=[])
        return item.model_copy(update={"content": [text]})
    if isinstance(item, ResponseFunctionToolCallOutputItem) and isinstance(item.output, list):
        return item.model_copy(update={"output": [part.model_dump(exclude_none=True) for part in item.output]})
    if isinstance(item, dict) and item.get("role") == "assistant" and isinstance(item.get("content"), list):
        return {**item, "content": "".join(_text(part) for part in item["content"])}
    return item


def _text(part: Any) -> str:
    text = part.get("text", part.get("refusal")) if isinstance(part, dict) else None
    return text if isinstance(text, str) else ""
