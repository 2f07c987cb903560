"""Open requests of which nothing comes: their deadline, and whether the stream still holds them.

Deltas travel at most once: if the last one was lost, only the stream tells that the request is over.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping

from llmserve.bus.base import Bus, BusError
from llmserve.gateway.attempts import Action
from llmserve.gateway.call import Call

log = logging.getLogger(__name__)

_SWEEP_S = 1.0
_PROBES_A_SWEEP = 200


class Watch:
    """Run between ``start`` and ``stop``; ``act`` gets what is to be done about a call."""

    def __init__(
        self,
        bus: Bus,
        calls: Mapping[str, Call],
        act: Callable[[Call, list[Action], float], None],
        deadline_s: float,
        probe_after_s: float,
    ) -> None:
        """``calls`` are looked through as they are at the time."""
        self._bus = bus
        self._calls = calls
        self._act = act
        self._deadline_s = deadline_s
        self._probe_after_s = probe_after_s
        self._sweeping: asyncio.Task[None] | None = None
        self._probes: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        self._sweeping = asyncio.get_running_loop().create_task(self._sweep_forever())

    def stop(self) -> None:
        for task in (self._sweeping, *self._probes):
            if task is not None:
                task.cancel()

    async def _sweep_forever(self) -> None:
        while True:
            await asyncio.sleep(min(_SWEEP_S, self._deadline_s / 4))
            try:
                self._sweep(time.monotonic())
            except Exception:
                log.exception("open requests could not be looked through, trying again")

    def _sweep(self, now: float) -> None:
        probes = _PROBES_A_SWEEP
        for call in list(self._calls.values()):
            idle_s = now - call.progress_s
            if idle_s > self._deadline_s:
                self._act(call, call.attempts.expired(self._deadline_s), now)
            elif call.missing_since_s is not None and call.progress_s < call.missing_since_s:
                if now - call.missing_since_s >= _SWEEP_S / 2:
                    cause = "it is off the stream and its last tokens never came"
                    self._act(call, call.attempts.lost(call.attempts.attempt, cause), now)
            elif (seq := call.attempts.stored_seq) is not None and probes and self._is_probe_due(call, idle_s, now):
                probes -= 1
                call.probing, call.probed_s = True, now
                probe = asyncio.get_running_loop().create_task(self._probe(call, seq))
                self._probes.add(probe)
                probe.add_done_callback(self._probes.discard)

    def _is_probe_due(self, call: Call, idle_s: float, now: float) -> bool:
        """Ever less often the longer nothing comes: thousands may wait in a queue for minutes."""
        if call.probing or idle_s <= self._probe_after_s:
            return False
        return now - call.probed_s >= max(self._probe_after_s, idle_s / 2)

    async def _probe(self, call: Call, seq: int) -> None:
        try:
            if await self._bus.fetch(seq) is None and seq == call.attempts.stored_seq:
                call.missing_since_s = time.monotonic()
        except BusError as error:
            log.warning("cannot look request %d up: %s", seq, error)
        finally:
            call.probing = False
