"""What a request costs, before and after it ran."""

from __future__ import annotations

from llmserve.bus.flow.entry import Entry
from llmserve.bus.flow.settings import RouterSettings

DECAY = 0.1
"""Weight of the newest output in a tenant's mean."""


class Costs:
    """Costs in prompt tokens: the prompt that had to be computed, the output times ``output_weight``, and the bytes
    that its handoff moved."""

    def __init__(self, settings: RouterSettings) -> None:
        self._output_weight = settings.output_weight
        self._tokens_per_byte = settings.kv_tokens_per_gb / 2**30
        self._first = settings.first_expected_output_tokens
        self._mean_output_tokens: dict[str, float] = {}

    def estimate(self, entry: Entry) -> float:
        """Before it runs: the worker reuses what is expected of it, all pages of a handoff move, and the output is as
        long as the tenant's of late."""
        expected = self._mean_output_tokens.get(entry.tenant, self._first)
        prompt_tokens = entry.prompt_tokens - entry.cached_tokens
        handoff = entry.handoff
        moved_bytes = handoff.pages * handoff.page_bytes if handoff is not None else 0
        return self._of(prompt_tokens, min(entry.max_tokens, expected), moved_bytes)

    def actual(self, entry: Entry, output_tokens: int, cached_tokens: int, moved_bytes: int) -> float:
        """Of all attempts together; what a later attempt computes or moves again is not the tenant's."""
        prompt_tokens = max(0, entry.prompt_tokens - entry.offset - cached_tokens)
        return self._of(prompt_tokens, entry.offset + output_tokens, moved_bytes)

    def _of(self, prompt_tokens: int, output_tokens: float, moved_bytes: int) -> float:
        return prompt_tokens + self._output_weight * output_tokens + self._tokens_per_byte * moved_bytes

    def learn(self, entry: Entry, output_tokens: int) -> None:
        """A request of the tenant ended by itself after so many tokens."""
        total = entry.offset + output_tokens
        mean = self._mean_output_tokens.get(entry.tenant)
        self._mean_output_tokens[entry.tenant] = total if mean is None else mean + DECAY * (total - mean)
