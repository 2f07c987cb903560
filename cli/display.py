"""What ``llmserve up`` shows while it starts: a line per part with its time, and what it still waits for."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TextIO


class Progress:
    """Lines on ``out``; on a terminal also one live line that names what is still starting."""

    def __init__(self, out: TextIO = sys.stdout) -> None:
        self._out = out
        self._live = out.isatty()
        self._start_s = time.monotonic()
        self._pending: dict[str, float] = {}
        self._ticker: asyncio.Task[None] | None = None

    def line(self, text: str) -> None:
        """Print a line above the live one."""
        self._out.write(("\r\x1b[K" if self._live else "") + text + "\n")
        self._draw()
        self._out.flush()

    @asynccontextmanager
    async def part(self, name: str, detail: str = "") -> AsyncIterator[None]:
        """Show ``name`` as starting while the body runs, then how long it took, or that it failed."""
        self._pending[name] = time.monotonic()
        if self._live and self._ticker is None:
            self._ticker = asyncio.create_task(self._tick())
        elif not self._live:
            self.line(f"  {name:<12} starting  {detail}".rstrip())
        try:
            yield
        except BaseException:
            self._done(name, "FAILED", detail)
            raise
        self._done(name, "ready", detail)

    def _done(self, name: str, what: str, detail: str) -> None:
        took_s = time.monotonic() - self._pending.pop(name)
        self.line(f"  {name:<12} {what:<8} {took_s:6.1f} s  {detail}".rstrip())
        if not self._pending and self._ticker is not None:
            self._ticker.cancel()
            self._ticker = None
            self._out.write("\r\x1b[K")

    async def _tick(self) -> None:
        while True:
            self._draw()
            self._out.flush()
            await asyncio.sleep(0.2)

    def _draw(self) -> None:
        if self._live and self._pending:
            names = ", ".join(self._pending)
            self._out.write(f"\r\x1b[K  ... {time.monotonic() - self._start_s:.0f} s, starting {names}")
