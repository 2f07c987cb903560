"""Requests that ended here a while ago.

A worker that dies between the last token of a request and its record leaves it on the stream. Its gateway, which has
the whole output, then records it in the worker's place.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from llmserve.bus.base import Bus, BusError
from llmserve.bus.messages import Finished, Reason, Result, Stage
from llmserve.gateway.call import Call

log = logging.getLogger(__name__)

KEEP_S = 120.0
"""Longer than it takes to miss a worker, an outage of the bus included."""


@dataclass(frozen=True, slots=True)
class _Ending:
    tenant: str
    result: Result
    ended_s: float


class Endings:
    """What the record of each request is that ended with its whole output in the last ``KEEP_S`` seconds."""

    def __init__(self, bus: Bus, member_id: str) -> None:
        self._bus = bus
        self._member_id = member_id
        self._endings: dict[str, _Ending] = {}
        """By request id, the oldest first."""
        self._recording: set[int] = set()
        """Sequences: the router repeats what it says until it has seen an effect."""

    def add(self, call: Call, reason: Reason, now_s: float) -> None:
        """The whole output of a request has come."""
        result = Result(
            request_id=call.request_id,
            attempt=call.attempts.attempt,
            worker=self._member_id,
            reason=reason,
            prompt_tokens=call.codec.prompt_tokens,
            output_tokens=len(call.attempts.tokens),
            cached_tokens=call.cached_tokens,
        )
        self._endings[call.request_id] = _Ending(call.tenant, result, now_s)
        while self._endings[oldest := next(iter(self._endings))].ended_s < now_s - KEEP_S:
            del self._endings[oldest]

    async def discard(self, seq: int) -> bool:
        """Take an attempt off the stream that another one replaces or nobody waits for; whether this took it off."""
        try:
            return await self._bus.discard(seq)
        except BusError as error:
            # The router drops it: a higher attempt supersedes it, or its gateway has cancelled it.
            log.warning("request %d stays on the stream: %s", seq, error)
            return False

    async def settle(self, request_id: str, seq: int) -> None:
        """Take an attempt off the stream that is over or superseded, with a record if its request has all its output:
        who ran it may have died before it wrote one, and finds nothing on the stream that says so.
        """
        ending = self._endings.get(request_id)
        if ending is None:
            await self.discard(seq)
        elif seq not in self._recording:
            self._recording.add(seq)
            try:
                await self._record(ending, seq)
            except BusError as error:
                log.warning("request %d is not recorded: %s", seq, error, extra={"bus_id": request_id})
            finally:
                self._recording.discard(seq)

    async def _record(self, ending: _Ending, seq: int) -> None:
        result = ending.result
        await self._bus.finish(seq, ending.tenant, result)
        finished = Finished(
            worker=self._member_id,
            seq=seq,
            request_id=result.request_id,
            attempt=result.attempt,
            stage=Stage.DECODE,
            reason=result.reason,
            prompt_tokens=result.prompt_tokens,
            output_tokens=result.output_tokens,
            cached_tokens=result.cached_tokens,
        )
        self._bus.publish(self._bus.subjects.events, finished)
