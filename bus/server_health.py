"""Whether a nats-server runs, serves, and can write."""

from __future__ import annotations

import asyncio
import json
import os
import urllib.error
import urllib.request


async def exited(pid: int) -> None:
    """Return when the child ``pid`` has ended."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(fd, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(fd)
        os.close(fd)


def is_healthy(monitor_url: str) -> bool:
    """Whether everything serves."""
    return _health(monitor_url).get("status") == "ok"


def write_error(monitor_url: str) -> str:
    """Why a stream cannot be written to; empty if all can, or the server does not say."""
    error = str(_health(monitor_url).get("error", ""))
    return error if "write error" in error else ""


def _health(monitor_url: str) -> dict[str, object]:
    try:
        with urllib.request.urlopen(f"{monitor_url}/healthz", timeout=1) as response:
            text = response.read()
    except urllib.error.HTTPError as refused:
        text = refused.read()
    except OSError:
        return {}
    try:
        return dict(json.loads(text))
    except ValueError:
        return {}
