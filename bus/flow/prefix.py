"""The blocks of one request's prompt, as its gateway named them."""

from __future__ import annotations

from dataclasses import dataclass

from llmserve.bus.block_hashes import SHORT_BYTES
from llmserve.bus.flow.prefix_index import Run
from llmserve.bus.messages import Request


@dataclass(slots=True, eq=False)
class Prefix:
    """Short hashes of the leading blocks, and what the index said of them last."""

    data: bytes
    block_tokens: int
    runs: tuple[Run, ...] = ()
    version: int = -1
    """Of the index, when it said so."""

    @classmethod
    def of(cls, request: Request) -> Prefix | None:
        """None if the request names no blocks, or nonsense: hints are not worth a refusal."""
        if request.block_tokens <= 0 or not request.block_hashes or len(request.block_hashes) % SHORT_BYTES:
            return None
        return cls(request.block_hashes, request.block_tokens)

    @property
    def head(self) -> bytes:
        """The first block's hash: prefixes of another head have nothing in common."""
        return self.data[:SHORT_BYTES]

    def common_blocks(self, other: Prefix) -> int:
        """Leading blocks that both have."""
        if self.block_tokens != other.block_tokens:
            return 0
        low, high = 0, min(len(self.data), len(other.data)) // SHORT_BYTES
        while low < high:
            middle = (low + high + 1) // 2
            if self.data[: middle * SHORT_BYTES] == other.data[: middle * SHORT_BYTES]:
                low = middle
            else:
                high = middle - 1
        return low
