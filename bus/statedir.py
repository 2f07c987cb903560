"""The state folder of an embedded server: its lock, endpoint, configuration, log and streams."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import time
import urllib.request
from pathlib import Path
from typing import IO

import msgspec
import psutil

from llmserve.bus.base import BusError
from llmserve.bus.tenants import USER, TenantAccount, accounts_config, read_accounts

_LOG_MAX_BYTES = 16 << 20
_LOCK_PATIENCE_S = 2.0
_RELOAD_PATIENCE_S = 2.0


class StateInUse(BusError):
    """Another server uses the state folder."""


class Endpoint(msgspec.Struct, frozen=True):
    """Where a server listens and how clients authenticate; kept over restarts."""

    port: int
    token: str

    @property
    def credentials(self) -> str:
        """The token as members give it: a user and his password."""
        return f"{USER}:{self.token}"


class StateDir:
    """Files of one server below ``root``; only the owner may read them."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.config = self.root / "nats.conf"
        self.log = self.root / "nats.log"
        self.run = self.root / "run"
        self.store = self.root / "jetstream"
        self.accounts_config = self.root / "accounts.conf"
        self._accounts = self.root / "tenants.json"
        self._endpoint = self.root / "endpoint.json"
        self._lock = self.root / "lock"
        self._fd: int | None = None

    @property
    def lock_fd(self) -> int:
        """Descriptor of the lock that ``acquire`` took."""
        if self._fd is None:
            raise BusError(f"the state folder {self.root} is not locked")
        return self._fd

    def acquire(self) -> None:
        """Make the folder ours. Raises ``StateInUse``; waits a moment for an orphan that is on its way out."""
        if self._fd is not None:
            return
        try:
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.run.mkdir(exist_ok=True, mode=0o700)
            fd = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise BusError(f"state folder {self.root}: {error.strerror}") from error
        deadline = time.monotonic() + _LOCK_PATIENCE_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
                    os.close(fd)
                    raise StateInUse(f"state folder {self.root} is in use by process {holder}") from None
                time.sleep(0.02)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        self._fd = fd

    def release(self) -> None:
        """Give the folder back."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def read_endpoint(self) -> Endpoint | None:
        """The endpoint of the last server here, None if there was none or its file is damaged."""
        try:
            return msgspec.json.decode(self._endpoint.read_bytes(), type=Endpoint)
        except (FileNotFoundError, msgspec.MsgspecError):
            return None

    def write_endpoint(self, endpoint: Endpoint) -> None:
        self._write_private(self._endpoint, msgspec.json.encode(endpoint))

    def accounts(self) -> list[TenantAccount]:
        """The tenants that were added. Raises ``BusError`` if their file is damaged."""
        try:
            return read_accounts(self._accounts)
        except msgspec.MsgspecError as error:
            raise BusError(f"{self._accounts} is damaged: {error}") from error

    def write_accounts(self, accounts: list[TenantAccount]) -> None:
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._write_private(self._accounts, msgspec.json.encode(accounts))

    def write_accounts_config(self, endpoint: Endpoint) -> None:
        """What the server's configuration includes: who may connect."""
        self._write_private(self.accounts_config, accounts_config(endpoint.token, self.accounts()).encode())

    def reconfigure(self) -> bool:
        """Have a server that runs here, of whatever process, read its accounts again; False if none runs.

        Twice, since the imports of an account that is new to the server are connected at the second reading.
        """
        endpoint = self.read_endpoint()
        if endpoint is None:
            return False
        self.write_accounts_config(endpoint)
        told = False
        for path in self.run.glob("*.ports"):
            pid = path.stem.rpartition("_")[2]
            # A server that was killed leaves its file, and its number to others.
            with contextlib.suppress(psutil.NoSuchProcess, ValueError):
                if psutil.Process(int(pid)).name() == "nats-server":
                    self._reload(int(pid))
                    self._reload(int(pid))
                    told = True
        return told

    def _reload(self, pid: int) -> None:
        """Returns when the server has read its configuration, or after a while if it does not say so."""
        monitor = self.monitor_url(pid)
        before = _config_loaded(monitor)
        os.kill(pid, signal.SIGHUP)
        until = time.monotonic() + _RELOAD_PATIENCE_S
        while _config_loaded(monitor) == before and time.monotonic() < until:
            time.sleep(0.01)

    def write_config(self, text: str) -> None:
        self._write_private(self.config, text.encode())

    def open_log(self) -> IO[bytes]:
        """The server's log, begun anew when it has grown large."""
        if self.log.exists() and self.log.stat().st_size > _LOG_MAX_BYTES:
            self.log.unlink()
        return self.log.open("ab")

    def log_tail(self) -> str:
        """The last line of the log, for an error message."""
        try:
            lines = self.log.read_text(errors="replace").splitlines()
        except FileNotFoundError:
            lines = []
        return lines[-1] if lines else "its log is empty"

    def clear_ports_files(self) -> None:
        """Remove what a killed server left."""
        for path in self.run.glob("*.ports"):
            path.unlink(missing_ok=True)

    def monitor_url(self, pid: int) -> str | None:
        """The monitoring address that the server ``pid`` announced, None if it has not yet."""
        for path in self.run.glob(f"*_{pid}.ports"):
            try:
                return str(json.loads(path.read_text())["monitoring"][0])
            except (OSError, ValueError, LookupError):
                return None  # not written to its end yet
        return None

    def _write_private(self, path: Path, data: bytes) -> None:
        temporary = path.with_name(path.name + ".new")
        temporary.unlink(missing_ok=True)
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
        temporary.replace(path)


def _config_loaded(monitor_url: str | None) -> str:
    """When the server last read its configuration, in its own words; nothing if it does not answer."""
    try:
        with urllib.request.urlopen(f"{monitor_url}/varz", timeout=1) as response:
            return str(json.load(response).get("config_load_time"))
    except (OSError, ValueError):
        return ""


def read_endpoint(state_dir: Path) -> Endpoint | None:
    """Where the embedded server of ``state_dir`` listens: for other processes of the same user."""
    return StateDir(state_dir).read_endpoint()
