"""What became of pages at one worker, in a line for people. No I/O."""

from __future__ import annotations

from collections import Counter

from llmserve.bus.messages import Role
from llmserve.workers.engine.base import Step


class CacheUse:
    """Sums since the worker started."""

    def __init__(self, role: Role) -> None:
        self._counts_reuse = role is not Role.DECODE
        """What a decode worker takes over, its prefill worker has counted."""
        self._tokens: Counter[str] = Counter()
        self._tiers: dict[str, Counter[str]] = {}
        self._open: set[str] = set()

    def saw(self, step: Step) -> None:
        """Take a step in."""
        for output in step.outputs if self._counts_reuse else ():
            self._tokens["loaded"] += output.loaded_tokens
            self._tokens["reused"] += output.cached_tokens or 0
        for name, counts in step.tiers.items():
            sums = self._tiers.setdefault(name, Counter())
            for what, number in counts.items():
                if what != "open":
                    sums[what] += int(number)
            (self._open.add if counts.get("open") else self._open.discard)(name)

    def __str__(self) -> str:
        """Empty as long as there is nothing to say."""
        said = []
        if self._tokens["reused"]:
            said.append(f"{self._tokens['reused']} prompt tokens reused, {self._tokens['loaded']} of them loaded")
        for name, sums in self._tiers.items():
            text = f"{name}: {sums['loads']} pages read, {sums['stores']} written"
            for what, words in (("bad", "damaged"), ("dropped", "dropped"), ("failures", "failures")):
                if sums[what]:
                    text += f", {sums[what]} {words}"
            said.append(text + (", out of use" if name in self._open else ""))
        return "; ".join(said)
