"""What ``llmserve status`` prints."""

from __future__ import annotations

from llmserve.bus.messages import Heartbeat, Role
from llmserve.cli.status import table


def test_the_engines_that_move_pages_are_told_with_the_reasons_of_those_that_do_not() -> None:
    transports = "same_host, nixl; ucx: package ucxx is not installed"
    worker = Heartbeat(member="w-1", role=Role.DECODE, host="h", pid=7, slots=4, transports=transports)
    router = Heartbeat(member="r-1", role=Role.ROUTER, host="h", pid=8)
    lines = table([router, worker]).splitlines()
    assert lines[0].split()[:3] == ["ROLE", "MEMBER", "HOST"]
    assert lines[3:] == [f"w-1: pages move by {transports}"]
