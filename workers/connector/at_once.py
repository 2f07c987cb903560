"""Pages that are loaded in the very step that computes with them: when that may be, and what is not certain yet.

vLLM looks for the end of any other load from step to step. Here the device waits for the pages, so that the request
computes its first token in the step that orders them. Whether they were valid all the while is known only with that
step's output: if not, nothing that was computed with them may leave the engine or stay in its prefix cache.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from llmserve.workers.connector.meta import Said
from llmserve.workers.connector.wire import Handoff


@dataclass(frozen=True, slots=True)
class Load:
    """Pages of one request, from the step that orders them until its output."""

    engine_id: str
    """Where they come from."""
    start: int
    """Tokens of the prompt before them."""
    pages: tuple[int, ...]


class AtOnce:
    """Decisions of the scheduler side; no I/O."""

    def __init__(self, limit_tokens: int, ranks: int, stands: Callable[[Handoff], bool]) -> None:
        """``limit_tokens``: more would hold up the other requests of the step for too long. ``stands``: whether all
        ranks of a producer on this host still hold the lease."""
        self._limit_tokens = limit_tokens
        self._ranks = ranks
        self._stands = stands
        self._near: defaultdict[str, set[str]] = defaultdict(set)
        """Producer -> own ranks that have read its pages within this host."""
        self._loads: dict[str, Load] = {}

    def may(self, handoff: Handoff, tokens: int) -> bool:
        """Whether so many tokens' pages may be loaded at once."""
        return (
            tokens <= self._limit_tokens
            and not handoff.ahead
            and len(self._near.get(handoff.engine_id, ())) == self._ranks
            and self._stands(handoff)
        )

    def begun(self, request: str, load: Load) -> None:
        self._loads[request] = load

    def doubts(self, computed_tokens: int) -> bool:
        """Whether the first ``computed_tokens`` of a prompt, found in the prefix cache, may be pages of a load whose
        end is not known: those are there before they are certain."""
        return any(load.start < computed_tokens for load in self._loads.values())

    def heard(self, said: Said) -> list[tuple[str, Load]]:
        """What the workers say after a step; the loads among it that were not valid."""
        for engine_id, rank in said.near:
            self._near[engine_id].add(rank)
        ended = [(request, self._loads.pop(request), fine) for request, fine in said.loaded.items()]
        spoilt = [(request, load) for request, load, fine in ended if not fine]
        for _, load in spoilt:
            self._near.pop(load.engine_id, None)
        return spoilt
