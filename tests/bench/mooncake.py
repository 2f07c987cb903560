"""Mooncake's conversation trace, made smaller: a block of 512 tokens is one page of ``BLOCK``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

BLOCK = 16
SHRINK = 512 // BLOCK


class TraceLine(msgspec.Struct):
    timestamp: int
    """Milliseconds."""
    input_length: int
    output_length: int
    hash_ids: list[int]


@dataclass(frozen=True, slots=True)
class Ask:
    """One request of the trace, made smaller."""

    at_s: float
    prompt: list[int]
    max_tokens: int


def block(number: int) -> list[int]:
    """The tokens of a block: no two blocks have the same."""
    return [
        100 + number % 30_000,
        100 + number // 30_000,
        *(100 + (number * 31 + k) % 30_000 for k in range(BLOCK - 2)),
    ]


def asks(lines: Sequence[TraceLine], compression: float, *, reuse: bool) -> list[Ask]:
    """``reuse`` False: every block is another."""
    made, fresh = [], 10_000_000
    for line in lines:
        length = max(1, round(line.input_length / SHRINK))
        numbers = line.hash_ids
        if not reuse:
            numbers = list(range(fresh, fresh + len(numbers)))
            fresh += len(numbers)
        prompt = [token for number in numbers for token in block(number)][:length]
        output = max(1, round(line.output_length / SHRINK))
        made.append(Ask((line.timestamp - lines[0].timestamp) / 1e3 / compression, prompt, output))
    return made


def read_trace(path: Path, count: int) -> list[TraceLine]:
    decoder = msgspec.json.Decoder(TraceLine)
    with path.open("rb") as file:
        return [decoder.decode(line) for line, _ in zip(file, range(count), strict=False)]


def compression(lines: Sequence[TraceLine], engines: int, prefill_s_per_token: float, load: float) -> float:
    """Of time, so that computing every prompt whole would take ``load`` of the time of so many engines."""
    tokens = sum(max(1, round(line.input_length / SHRINK)) for line in lines)
    busy_s = tokens * prefill_s_per_token / engines
    return (lines[-1].timestamp - lines[0].timestamp) / 1e3 / (busy_s / load)


def reusable(requests: Sequence[Ask]) -> float:
    """Part of all prompt tokens that a cache which forgets nothing would not compute: whole blocks at the beginning
    of a prompt that an earlier one began with, but for its last token."""
    seen: set[int] = set()
    reused = total = 0
    for ask in requests:
        prefix = 0
        leading = True
        for end in range(BLOCK, len(ask.prompt) + 1, BLOCK):
            prefix = hash((prefix, *ask.prompt[end - BLOCK : end]))
            leading = leading and prefix in seen
            reused += BLOCK if leading and end < len(ask.prompt) else 0
            seen.add(prefix)
        total += len(ask.prompt)
    return reused / total
