"""How fast an engine loads pages from each tier, as measured: what the router weighs against computing them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from llmserve.bus.messages import Tier
from llmserve.manifests.schema import StorageClass

_WEIGHT = 0.3
"""Of the newest measurement."""
_TIERS = {"filesystem": Tier.NVME, "s3": Tier.S3}


class LoadRates:
    """Moving averages in prompt tokens a second, by ``Tier``; tiers that were never read are left out."""

    def __init__(self, classes: Iterable[StorageClass]) -> None:
        self._tiers = {storage.name: _TIERS[storage.type] for storage in classes}
        self.tokens_s: dict[str, float] = {}

    def saw(self, tiers: Mapping[str, Mapping[str, float]], page_tokens: int) -> None:
        """Take in what happened at the storage classes, as in ``Step.tiers``."""
        for name, counts in tiers.items():
            pages, seconds = counts.get("loads", 0.0), counts.get("load_s", 0.0)
            if pages and seconds and name in self._tiers:
                tier, rate = self._tiers[name], pages * page_tokens / seconds
                known = self.tokens_s.get(tier, rate)
                self.tokens_s[tier] = known + _WEIGHT * (rate - known)
