"""Assistants' messages in the input of a response: vLLM reads the first part of one only, and fails at a refusal."""

from __future__ import annotations

from typing import Any

from openai.types.responses import ResponseOutputMessage, ResponseOutputText


def whole_messages(items: list[Any]) -> list[Any]:
    """``items`` with each of an assistant's messages as one text: of all its parts, refusals included."""
    return [_whole(item) for item in items]


def _whole(item: Any) -> Any:
    if isinstance(item, ResponseOutputMessage):
        texts = [part.refusal if part.type == "refusal" else part.text for part in item.content]
        text = ResponseOutputText(type="output_text", text="".join(texts), annotations=[])
        return item.model_copy(update={"content": [text]})
    if isinstance(item, dict) and item.get("role") == "assistant" and isinstance(item.get("content"), list):
        return {**item, "content": "".join(_text(part) for part in item["content"])}
    return item


def _text(part: Any) -> str:
    text = part.get("text", part.get("refusal")) if isinstance(part, dict) else None
    return text if isinstance(text, str) else ""
