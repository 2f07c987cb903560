"""The disk of ``llmserve up`` is full, and has room again: requests are refused meanwhile, and none is lost."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import httpx
import pytest

from tests.bench.load import Stream, prompt_bodies, stream
from tests.processes import Stack, manifest_with, metrics, running, total, wait_for

pytestmark = pytest.mark.faults

DISK_MB = 48
OWN_MOUNTS = ["unshare", "--map-root-user", "--mount"]


class SmallDisk(Stack):
    """The stack with a state folder on a disk of its own, which only it can see."""

    def __init__(self, folder: Path) -> None:
        self.state = folder / "state"
        self.state.mkdir()
        manifest = manifest_with("sim.yaml", folder, {"engine.max_num_seqs": 8})
        super().__init__(manifest, folder / "up.log")

    def command(self) -> list[str]:
        mount = f"mount -t tmpfs -o size={DISK_MB}m none {self.state}"
        return [*OWN_MOUNTS, "sh", "-c", f'{mount} && exec "$@"', "sh", *super().command()]

    @property
    def filler(self) -> Path:
        """A file on that disk, as it is seen from here."""
        return Path(f"/proc/{self.pid}/root{self.state}/filler")

    def fill(self) -> None:
        with self.filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1 << 16))
            except OSError:
                while True:
                    try:
                        file.write(b"0")
                    except OSError:
                        return


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[SmallDisk]:
    mounted = subprocess.run([*OWN_MOUNTS, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no right to mount: {mounted.stderr.decode().strip()}")
    stack = SmallDisk(tmp_path)
    with running(stack):
        stack.ready(60)
        yield stack


async def test_a_full_disk_refuses_requests_and_loses_none(stack: SmallDisk) -> None:
    # Eight slots: of twenty some run when the disk is full, and some are queued.
    bodies = prompt_bodies(stack.model, 20, 60, 200, seed=5)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=90)) as session:

        async def answers(bodies: list[dict[str, object]]) -> list[Stream]:
            return await asyncio.gather(*(stream(session, stack.url, body) for body in bodies))

        asking = asyncio.create_task(answers(bodies))
        await asyncio.sleep(0.8)
        await asyncio.to_thread(stack.fill)
        assert not asking.done()
        async with httpx.AsyncClient(timeout=30) as client:
            refused = await client.post(f"{stack.url}/v1/completions", json={**bodies[0], "max_tokens": 5})
        assert refused.status_code == 503
        assert refused.json()["error"]["type"] == "ServiceUnavailableError"
        assert refused.json()["error"]["code"] == 503
        assert refused.headers["retry-after"]
        stack.filler.unlink()
        ended = await asking
        assert not [one.error for one in ended if one.error]
        calm = await answers(bodies)
    assert [one.text for one in ended] == [one.text for one in calm]

    def left() -> float:
        figures = metrics(stack.metrics_url)
        names = ("llmserve_queue_depth", "llmserve_tokens_in_flight", "llmserve_worker_requests")
        return sum(total(figures, name) for name in names)

    await asyncio.to_thread(wait_for, lambda: not left(), 15, "everything to be over")
