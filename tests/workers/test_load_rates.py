"""Measured rates of loading."""

from __future__ import annotations

from llmserve.bus.messages import Tier
from llmserve.manifests.schema import StorageClass
from llmserve.workers.engine.load_rates import LoadRates

CLASSES = (
    StorageClass(name="disk", type="filesystem", path="/p"),
    StorageClass(name="object", type="s3", bucket="b"),
)


def test_a_tier_that_was_never_read_has_no_rate() -> None:
    rates = LoadRates(CLASSES)
    rates.saw({"disk": {"stores": 3}, "other": {"loads": 1, "load_s": 1}}, 128)
    assert rates.tokens_s == {}


def test_rates_follow_what_is_measured() -> None:
    rates = LoadRates(CLASSES)
    rates.saw({"disk": {"loads": 10, "load_s": 0.1}, "object": {"loads": 2, "load_s": 1.0}}, 100)
    assert rates.tokens_s == {Tier.NVME: 10_000.0, Tier.S3: 200.0}
    for _ in range(50):
        rates.saw({"disk": {"loads": 1, "load_s": 0.1}}, 100)
    assert 999 < rates.tokens_s[Tier.NVME] < 1001
