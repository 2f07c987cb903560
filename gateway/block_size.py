"""How many tokens a page of the deployment has: what block hashes are computed by."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from llmserve.bus.messages import AnyMessage, Heartbeat, Role
from llmserve.gateway.readiness import SILENT_AFTER_S


class BlockSize:
    """Hears heartbeats of the workers that compute prompts."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._workers: dict[str, tuple[int, float]] = {}
        self._tokens = 0
        self._counted_s = float("-inf")

    def hear(self, message: AnyMessage) -> None:
        """Handler of the heartbeats' subject."""
        if not isinstance(message, Heartbeat) or message.role not in (Role.PREFILL, Role.BOTH):
            return
        if message.leaving:
            known = self._workers.pop(message.member, None)
        else:
            known = self._workers.get(message.member)
            self._workers[message.member] = (message.page_tokens, self._clock_s())
        if message.leaving or known is None or known[0] != message.page_tokens:
            self._counted_s = float("-inf")

    @property
    def tokens(self) -> int:
        """Of most workers that are alive and have pages; 0 without any."""
        now_s = self._clock_s()
        if now_s - self._counted_s >= 1.0:
            self._counted_s = now_s
            self._workers = {name: seen for name, seen in self._workers.items() if now_s - seen[1] < SILENT_AFTER_S}
            counts = Counter(tokens for tokens, _ in self._workers.values() if tokens)
            self._tokens = counts.most_common(1)[0][0] if counts else 0
        return self._tokens
