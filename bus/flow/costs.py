"""What a request costs, before and after it ran."""

from __future__ import annotations

from llmserve.bus.flow.entry import Entry

DECAY = 0.1
"""Weight of the newest output in a tenant's mean."""


class Costs:
    """Costs in prompt tokens: of the prompt that had to be computed, and of the output times ``output_weight``."""

    def __init__(self, output_weight: float, first_expected_output_tokens: float) -> None:
        self._output_weight = output_weight
        self._first = first_expected_output_tokens
        self._mean_output_tokens: dict[str, float] = {}

    def estimate(self, entry: Entry) -> float:
        """Before it runs: the worker reuses what is expected of it, the output is as long as the tenant's of late."""
        expected = self._mean_output_tokens.get(entry.tenant, self._first)
        prompt_tokens = entry.prompt_tokens - entry.cached_tokens
        return prompt_tokens + self._output_weight * min(entry.max_tokens, expected)

    def actual(self, entry: Entry, output_tokens: int, cached_tokens: int) -> float:
        """Of all attempts together; prompt tokens that a later attempt computes again are not the tenant's."""
        prompt_tokens = max(0, entry.prompt_tokens - entry.offset - cached_tokens)
        return prompt_tokens + self._output_weight * (entry.offset + output_tokens)

    def learn(self, entry: Entry, output_tokens: int) -> None:
        """A request of the tenant ended by itself after so many tokens."""
        total = entry.offset + output_tokens
        mean = self._mean_output_tokens.get(entry.tenant)
        self._mean_output_tokens[entry.tenant] = total if mean is None else mean + DECAY * (total - mean)
