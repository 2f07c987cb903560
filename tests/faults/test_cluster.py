"""Three nats-servers that keep every stream three times lose the one that leads: nothing accepted is lost."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.faults.load import prompt, require_exact, require_once
from tests.faults.observer import Observer
from tests.processes import BIN, Process, answers, free_port, wait_for
from tests.services import Services
from tests.sim_gateway import Answer, SimGateway

pytestmark = pytest.mark.faults

NODES = ("nats-0", "nats-1", "nats-2")


class Cluster(Services):
    """Routers and workers on three nats-servers."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "sim.yaml", {"bus.replicas": 3})
        self.client_ports = {name: free_port() for name in NODES}
        self.route_ports = {name: free_port() for name in NODES}
        self.monitors = {name: f"http://127.0.0.1:{free_port()}" for name in NODES}
        self.nats_url = ",".join(f"nats://secret@127.0.0.1:{port}" for port in self.client_ports.values())
        self.variables["NATS_URL"] = self.nats_url

    def start_node(self, name: str) -> None:
        routes = ", ".join(f'"nats://127.0.0.1:{port}"' for port in self.route_ports.values())
        config = self.folder / f"{name}.conf"
        config.write_text(f"""\
server_name: "{name}"
listen: "127.0.0.1:{self.client_ports[name]}"
http: "{self.monitors[name].removeprefix("http://")}"
authorization {{ token: "secret" }}
jetstream {{ store_dir: "{self.folder / name}", sync_interval: "1s" }}
cluster {{ name: "three", listen: "127.0.0.1:{self.route_ports[name]}", routes: [{routes}] }}
""")
        self.processes[name] = Process(
            name, [str(BIN / "nats-server"), "-c", str(config)], self.folder / f"{name}.log"
        )

    def leader_of(self, stream: str) -> str:
        """Name of the server that leads a stream; empty while there is none."""
        for name, monitor in self.monitors.items():
            if self.processes[name].child.poll() is not None:
                continue
            with urllib.request.urlopen(f"{monitor}/jsz?streams=true", timeout=5) as response:
                accounts = json.load(response).get("account_details") or []
            for account in accounts:
                for detail in account.get("stream_detail") or []:
                    if detail["name"] == stream and detail.get("cluster", {}).get("leader"):
                        return str(detail["cluster"]["leader"])
        return ""


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """In place of the folder's deployment: its observer and its gateway join this one."""
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        for name in NODES:
            cluster.start_node(name)
        for name in NODES:
            wait_for(partial(answers, f"{cluster.monitors[name]}/healthz"), 40, name)
        for name, service in (("router", ""), ("router-2", "router"), ("prefill", ""), ("decode", "")):
            cluster.start(name, service or None)
        for name in ("prefill", "decode"):
            cluster.processes[name].wait_for_line("ready after", 60)
        yield cluster
    finally:
        cluster.end()


async def test_the_cluster_loses_its_leader_and_no_accepted_request(
    services: Cluster, observer: Observer, gateway: SimGateway
) -> None:
    stream = observer.bus.subjects.request_stream
    asking: list[asyncio.Task[Answer]] = []

    async def load() -> None:
        for number in range(200):
            asking.append(asyncio.create_task(gateway.ask(prompt(number), 60)))
            await asyncio.sleep(0.04)

    loading = asyncio.create_task(load())
    await asyncio.sleep(1.5)
    victim = await asyncio.to_thread(services.leader_of, stream)
    assert victim in NODES
    services.processes[victim].kill()
    await loading
    ended = await asyncio.gather(*asking)
    assert await asyncio.to_thread(services.leader_of, stream) not in ("", victim)
    require_exact(ended)
    await require_once(observer, {gateway.member})
    await observer.settled(20)
    services.start_node(victim)
    await asyncio.to_thread(
        wait_for, lambda: answers(f"{services.monitors[victim]}/healthz"), 40, f"{victim} to be back"
    )
    require_exact([await gateway.ask(prompt(1000), 20)])
