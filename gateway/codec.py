"""What the gateway must know of the engine to speak for it: its own request and output encodings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from llmserve.gateway.attempts import Mode


class Refusal(Exception):
    """The request asks for something that does not work over the bus; the message names it."""


class RequestCodec(ABC):
    """The engine's encoding of one request, for each of its attempts."""

    mode: Mode
    """What a further attempt can do."""
    whole_output: bool
    """See ``Request.whole_output``."""
    prompt_tokens: int
    max_tokens: int

    @abstractmethod
    def body(self, request_id: str, delivered: Sequence[int]) -> bytes:
        """The engine's request to continue behind ``delivered`` output tokens."""

    def block_hashes(self, delivered: Sequence[int], block_tokens: int) -> bytes:
        """``Request.block_hashes`` of that request's prompt; empty if it can reuse nothing."""
        return b""
