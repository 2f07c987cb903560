"""Sequences of the simulated engine: their tokens, the names of their pages, and where they stand."""

from __future__ import annotations

import enum
import zlib
from array import array
from dataclasses import dataclass, field

from llmserve.bus.block_hashes import SHORT_BYTES, chain
from llmserve.bus.messages import Reason, Stage

FIRST_TOKEN_ID = 100
TOKEN_IDS = 39_900
"""Sampled ids lie in 100..39,999: inside every vocabulary in use here, above its special tokens."""


class Phase(enum.Enum):
    WAITING = "waiting"
    LOADING = "loading"
    """Has its pages; their content is on its way from another engine."""
    RUNNING = "running"
    HELD = "held"
    """Prefilled; the pages wait for a decode engine."""
    GONE = "gone"


@dataclass(slots=True, eq=False)
class Names:
    """The block hashes of one sequence's tokens."""

    cache_salt: str
    block_tokens: int
    hashes: list[int] = field(default_factory=list)
    """Of all full blocks so far."""
    shared: list[int] = field(default_factory=list)
    """Those of them whose pages it uses by name."""
    parent: bytes = b""
    tail: list[int] = field(default_factory=list)
    """Tokens behind the last full block."""

    def append(self, tokens: list[int]) -> None:
        self.tail += tokens
        if len(self.tail) < self.block_tokens:
            return
        for full in chain(self.tail, self.block_tokens, self.cache_salt, self.parent):
            self.hashes.append(int.from_bytes(full[-SHORT_BYTES:], "big"))
            self.parent = full
        del self.tail[: len(self.tail) // self.block_tokens * self.block_tokens]


@dataclass(slots=True, eq=False)
class Sequence:
    """One piece of work. ``computed`` of its ``length`` tokens have their KV in ``pages``."""

    work_id: str
    stage: Stage
    prompt: int
    limit: int
    """Output tokens at most, those of earlier stages included."""
    min_tokens: int
    stop_token_ids: frozenset[int]
    digest: int
    """CRC-32 of all tokens so far: the next token is a function of it."""
    generated: int
    handoff: bytes
    phase: Phase = Phase.WAITING
    computed: int = 0
    pages: int = 0
    names: Names | None = None
    """None without a prefix cache."""
    prefilled: int = 0
    """Prompt tokens computed here, again after a preemption."""
    cached: int = 0
    loaded: int = 0
    """Of ``cached``, tokens that came from the tier."""
    yielded: bool = False

    @property
    def length(self) -> int:
        return self.prompt + self.generated

    def sample(self) -> tuple[int, Reason | None]:
        """The next token, now part of the sequence, and why it is the last."""
        token = next_token(self.digest)
        if self.generated < self.min_tokens:
            while token in self.stop_token_ids:
                token = FIRST_TOKEN_ID + (token - FIRST_TOKEN_ID + 1) % TOKEN_IDS
        self.digest = zlib.crc32(token.to_bytes(4, "little"), self.digest)
        self.generated += 1
        if self.names is not None:
            self.names.append([token])
        if token in self.stop_token_ids:
            return token, Reason.STOP
        return token, Reason.LENGTH if self.generated >= self.limit else None


def digest_of(tokens: list[int]) -> int:
    """The digest of a sequence that starts with ``tokens``."""
    return zlib.crc32(array("I", tokens).tobytes())


def next_token(digest: int) -> int:
    """The token that follows a sequence of this digest (Knuth's multiplicative hash spreads the CRC)."""
    return FIRST_TOKEN_ID + (digest * 2_654_435_761 & 0xFFFFFFFF) % TOKEN_IDS


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes of the simulated engine."""

    slots: int
    step_tokens: int
    pages: int
    page_tokens: int
    max_model_len: int
    chunked: bool = True
    """False: a prompt is computed in one step."""
    long_prompt_tokens: int | None = None
    """A longer prompt advances by at most so many tokens a step."""
    prefix_cache: bool = False
    dram_pages: int = 0
    """Of a tier below the prefix cache."""

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)


@dataclass(slots=True)
class Batch:
    """The next step: sequences with the tokens that each computes."""

    items: list[tuple[Sequence, int]] = field(default_factory=list)
    prefill_tokens: int = 0
    decodes: int = 0
    loaded_pages: int = 0
    """From the tier, before the step."""
    loads: list[Sequence] = field(default_factory=list)
    """Admitted sequences whose pages are now to be fetched; they are not in ``items``."""
