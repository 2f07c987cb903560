"""What is wrong with a manifest, in lines for a person."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeAlias

FieldPath: TypeAlias = tuple[str | int, ...]
"""Where a value stands: field names, keys of mappings and indices of lists."""

_PLAIN = re.compile(r"[A-Za-z0-9_-]+\Z")
_SHOWN_CHARACTERS = 60


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong."""

    path: FieldPath
    message: str

    def __str__(self) -> str:
        return f"{dotted(self.path)}: {self.message}" if self.path else self.message


class ManifestError(ValueError):
    """The manifest cannot be used. Its text has one line for each problem."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = tuple(lines)


def dotted(path: FieldPath) -> str:
    """The path as a user writes it: ``spec.security.api_keys[0].tenant``."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        elif _PLAIN.match(part):
            text += f".{part}" if text else part
        else:
            text += f"[{shown(part)}]"
    return text


def shown(value: object) -> str:
    """The value as it is quoted in a message: short, on one line, in YAML's terms."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case dict():
            return "a mapping"
        case list():
            return "a list"
        # Python refuses to print integers beyond some thousand digits.
        case int() if abs(value) >= 2**64:
            return "a number of more than 64 bits"
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 3]}..."
