"""What ``llmserve status`` prints."""

from __future__ import annotations

from llmserve.bus.flow.locality import Locality, Reuse
from llmserve.bus.flow.prefix_index import Source
from llmserve.bus.messages import Heartbeat, Role, Tier
from llmserve.cli.status import table
from llmserve.workers.cache_use import CacheUse
from llmserve.workers.engine.base import EngineOutput, Step


def test_the_engines_that_move_pages_are_told_with_the_reasons_of_those_that_do_not() -> None:
    transports = "same_host, nixl; ucx: package ucxx is not installed"
    worker = Heartbeat(member="w-1", role=Role.DECODE, host="h", pid=7, slots=4, transports=transports)
    router = Heartbeat(member="r-1", role=Role.ROUTER, host="h", pid=8)
    lines = table([router, worker]).splitlines()
    assert lines[0].split()[:3] == ["ROLE", "MEMBER", "HOST"]
    assert lines[3:] == [f"w-1: pages move by {transports}"]


def test_what_is_known_kept_and_found_of_pages_is_told_by_each_who_knows() -> None:
    known = Locality(100)
    known.index.store(Source("w-1", Tier.GPU, "f", 16), [1, 2])
    known.index.store(Source("kv-1", Tier.NVME, "f", 16, "h"), [2, 3])
    known.granted(Reuse({Tier.GPU: 32, Tier.NVME: 16}, 10.0), 60)
    known.granted(Reuse({}, 60.0), 60)
    use = CacheUse(Role.PREFILL)
    output = EngineOutput("w", [1], cached_tokens=640, loaded_tokens=512)
    use.saw(Step([output], tiers={"disk": {"loads": 4, "stores": 2, "bad": 1, "open": 0}}))
    use.saw(Step(tiers={"disk": {"stores": 3, "open": 1}, "object": {"open": 0}}))
    worker = Heartbeat(member="w-1", role=Role.PREFILL, host="h", pid=7, slots=4, cache=str(use))
    router = Heartbeat(member="r-1", role=Role.ROUTER, host="h", pid=8, cache=known.summary())
    assert table([router, worker]).splitlines()[3:] == [
        "r-1: 3 blocks known (2 gpu, 2 nvme); 1 of 2 prompts placed at pages of theirs, 48 tokens (32 gpu, 16 nvme)",
        "w-1: 640 prompt tokens reused, 512 of them loaded; disk: 4 pages read, 5 written, 1 damaged, out of use; "
        "object: 0 pages read, 0 written",
    ]
