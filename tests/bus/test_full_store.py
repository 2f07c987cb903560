"""The server's store reaches its limit: what was accepted stays, what comes is refused, and room makes all well."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from llmserve.bus.base import BusUnavailable
from llmserve.bus.nats import connect
from llmserve.bus.settings import BusSettings
from tests.bus.samples import a_request, a_result
from tests.processes import BIN, Process, answers, free_port, running, wait_for

pytestmark = pytest.mark.faults


async def test_a_full_store_refuses_requests_and_loses_none_and_results_wait_for_room(
    tmp_path: Path,
) -> None:
    port, monitor = free_port(), f"127.0.0.1:{free_port()}"
    config = tmp_path / "nats.conf"
    config.write_text(f"""\
listen: "127.0.0.1:{port}"
http: "{monitor}"
jetstream {{
  store_dir: "{tmp_path}"
  max_file_store: 1MB
}}
""")
    with running(Process("nats", [str(BIN / "nats-server"), "-c", str(config)], tmp_path / "log")):
        wait_for(lambda: answers(f"http://{monitor}/healthz"), 10, "nats")
        settings = BusSettings(publish_patience_s=0.5)
        bus = await connect(f"nats://127.0.0.1:{port}", None, "test", member="m", settings=settings)
        accepted: list[int] = []

        async def fill() -> None:
            for number in range(100):
                request = a_request(f"r{number}", body=bytes(32 << 10))
                accepted.append(await bus.accept(request, "acme", "interactive"))

        with pytest.raises(BusUnavailable, match="resource"):
            await fill()
        assert len(accepted) > 20
        finishing = asyncio.create_task(bus.finish(accepted[0], "acme", a_result("r0")))
        await asyncio.sleep(0.7)
        assert (await bus.contents()).seqs == set(accepted)
        assert not finishing.done()
        for seq in accepted[-3:]:
            assert await bus.discard(seq)
        assert await finishing
        assert await bus.accept(a_request("late"), "acme", "interactive")
        assert (await bus.contents()).seqs > set(accepted[1:-3])
        await bus.close()
