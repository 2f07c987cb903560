"""The two classes of one stage: interactive work, and batch work that takes what it leaves.

Batch work earns ``share`` of what is served while both wait, so that it never stands still; whatever else it gets is
room that no interactive request could use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from llmserve.bus.flow.entry import Entry
from llmserve.bus.flow.queue import FairQueue

BATCH = "batch"


class Lanes:
    """The queues of both classes; ``share`` is the batch lane's guaranteed part of the service, 0 to below 1."""

    def __init__(self, make: Callable[[], FairQueue[Entry]], share: float) -> None:
        self.interactive = make()
        self.batch = make()
        self.earned = 0.0
        """Cost that the batch lane may be served before interactive work."""
        self._asked = 0.0
        """Cost of the batch request that was looked at last."""
        self._rate = share / (1.0 - share)

    @property
    def size(self) -> int:
        return self.interactive.size + self.batch.size

    def lane(self, klass: str) -> FairQueue[Entry]:
        """The queue of a class; whatever is not batch is interactive."""
        return self.batch if klass == BATCH else self.interactive

    def served(self, queue: FairQueue[Entry], cost: float) -> None:
        """One of the two was charged ``cost``."""
        if queue is self.batch:
            self.earned = max(0.0, self.earned - cost)
        elif self.batch.size:
            earned = self._rate * cost
            self.earned = min(self.earned + earned, 2 * max(self._asked, earned))
        if not self.batch.size:
            self.earned = 0.0

    def batch_due(self, cost: float) -> bool:
        """Whether the batch lane has earned a request of ``cost``. It cannot save up more than about two of them, if
        there is no room for it."""
        self._asked = cost
        return self.earned >= cost

    def unpark(self, tenant: str) -> None:
        self.interactive.unpark(tenant)
        self.batch.unpark(tenant)

    def sizes(self) -> Iterator[tuple[str, int]]:
        """(tenant, queued requests), a tenant up to twice."""
        yield from self.interactive.sizes()
        yield from self.batch.sizes()

    def items(self) -> Iterator[Entry]:
        """All queued requests, in no order."""
        yield from self.interactive.items()
        yield from self.batch.items()

    def check(self) -> None:
        """Assert the invariants."""
        self.interactive.check()
        self.batch.check()
        assert self.earned >= 0.0, "batch work owes"
        assert all(entry.klass != BATCH for entry in self.interactive.items()), "batch work in the interactive lane"
        assert all(entry.klass == BATCH for entry in self.batch.items()), "interactive work in the batch lane"
