"""Which pages an engine fetches while their prompt is still computed elsewhere: of each prompt one request at a time.

What it brings stays in the prefix cache, where the request itself finds it.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmserve.workers.engine.base import Work


@dataclass(slots=True)
class _Running:
    core_id: str
    next: Work | None = None
    """The newest offer that came meanwhile."""


class Ahead:
    """Requests that end without anybody being told."""

    def __init__(self) -> None:
        self._running: dict[str, _Running] = {}
        """By work id."""
        self._by_core: dict[str, str] = {}

    def offered(self, work: Work) -> bool:
        """Whether to fetch it now; else it waits for the one before."""
        running = self._running.get(work.work_id)
        if running is not None:
            running.next = work
        return running is None

    def begun(self, work_id: str, core_id: str) -> None:
        self._running[work_id] = _Running(core_id)
        self._by_core[core_id] = work_id

    def ended(self, core_id: str) -> Work | None:
        """A request has ended, one of these or another; what to fetch next."""
        work_id = self._by_core.pop(core_id, None)
        return self._running.pop(work_id).next if work_id is not None else None

    def stop(self, work_id: str) -> str | None:
        """Fetch no more for that work; the core's id of what runs."""
        running = self._running.pop(work_id, None)
        if running is None:
            return None
        del self._by_core[running.core_id]
        return running.core_id
