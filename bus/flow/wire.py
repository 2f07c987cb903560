"""The budget of KV transfers, and what prefills have put before it, or are about to."""

from __future__ import annotations

import math
from collections.abc import Iterable

from llmserve.bus.flow.bucket import Bucket
from llmserve.bus.flow.credits import WorkerState
from llmserve.bus.flow.entry import Entry, Place
from llmserve.bus.flow.settings import RouterSettings

LOADS = 0.5
"""Part of the rate that loads of prefixes, which nothing holds back, draw in the long run at most."""
FIRST_LEASE_S = 30.0
"""Of a handoff, until one was seen."""
DECAY = 0.1
"""Weight of the newest handoff in the mean size."""


class Wire:
    """A token bucket of one second over the bytes of handoffs and loads.

    A handoff that waits for it longer than its lease is computed again, so prefill stops while what is before the
    bucket would take longer than that at the rate which loads leave to it; one handoff may come on top.
    """

    def __init__(self, settings: RouterSettings) -> None:
        rate = settings.max_kv_io_bytes_per_s
        self.bounded = rate is not None
        self._settings = settings
        self._bucket = Bucket(rate)
        # Loads may take a second of the whole rate at once: a larger burst, filled at a part of the rate.
        self._loads = Bucket(None if rate is None else LOADS * rate, 1.0 / LOADS)
        self._left_rate = 0.0 if rate is None else (1.0 - LOADS) * rate
        self.ahead_bytes = 0
        """Of handoffs that wait, and of those expected of running prefills."""
        self._lease_s = FIRST_LEASE_S
        self._mean_bytes = 0.0
        self._mean_tokens = 0.0
        """Of prompts of handoffs: their quotient is the size of a token."""

    def elapse(self, now_s: float) -> None:
        """Time went on."""
        self._bucket.elapse(now_s)

    @property
    def full(self) -> bool:
        """Whether nothing more should be prefilled for another worker by now."""
        if not self.bounded:
            return False
        in_time = self._left_rate * self._settings.usable_s(self._lease_s)
        return self.ahead_bytes + self._bucket.debt >= in_time

    def put_ahead(self, entry: Entry, worker: WorkerState) -> None:
        """The request is prefilled by ``worker``, or its handoff waits there."""
        if self.bounded:
            self._set(entry, moved_bytes(entry) if entry.handoff is not None else self._expected(entry, worker))

    def take_away(self, entry: Entry) -> None:
        """A decode worker has it, or nobody will."""
        self._set(entry, 0)

    def learn(self, entry: Entry) -> None:
        """From the handoff of the request."""
        if entry.handoff is None:
            return
        self._lease_s = entry.handoff.lease_s
        weight = DECAY if self._mean_tokens else 1.0
        self._mean_bytes += weight * (moved_bytes(entry) - self._mean_bytes)
        self._mean_tokens += weight * (entry.prompt_tokens - self._mean_tokens)

    def may_pass(self, entry: Entry, now_s: float) -> bool:
        """Whether the pages of its handoff may move now; loads always may."""
        return entry.handoff is None or self._bucket.has(moved_bytes(entry), now_s)

    def wait_s(self, entry: Entry, now_s: float) -> float:
        """Until its handoff may move, if nothing else does."""
        return self._bucket.wait_s(moved_bytes(entry), now_s)

    def passes(self, entry: Entry, now_s: float) -> None:
        """The request is granted: its handoff moves, or its worker loads what it reuses."""
        amount = float(moved_bytes(entry))
        if entry.handoff is None:
            amount = self._loads.take_at_most(amount, now_s)
        self._bucket.take(amount, now_s)

    def _expected(self, entry: Entry, worker: WorkerState) -> int:
        if self._mean_tokens:
            return math.ceil(entry.prompt_tokens * self._mean_bytes / self._mean_tokens)
        return math.ceil(entry.prompt_tokens * worker.beat.page_bytes / max(1, worker.beat.page_tokens))

    def _set(self, entry: Entry, amount: int) -> None:
        self.ahead_bytes += amount - entry.ahead_bytes
        entry.ahead_bytes = amount

    def check(self, entries: Iterable[Entry]) -> None:
        """Assert the invariants against all known requests."""
        self._bucket.check()
        self._loads.check()
        entries = list(entries)
        assert self.ahead_bytes == sum(entry.ahead_bytes for entry in entries), "bytes before the wire"
        for entry in entries:
            if entry.place is Place.WAITING and self.bounded:
                assert entry.ahead_bytes == moved_bytes(entry), f"{entry.seq}: bytes before the wire"
            assert not entry.ahead_bytes or entry.before_decode, f"{entry.seq}: nothing of it is before the wire"


def moved_bytes(entry: Entry) -> int:
    """Page bytes that a grant of the entry lets move: its handoff's, or what its worker loads of its prefix."""
    handoff = entry.handoff
    return entry.loaded_bytes if handoff is None else handoff.pages * handoff.page_bytes
