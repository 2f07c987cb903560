"""A gateway without a front end: the real channel and its attempts, asked by the test."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry

from llmserve.bus.base import Bus, BusError
from llmserve.bus.membership import Beater
from llmserve.bus.messages import Heartbeat, Reason, Role
from llmserve.gateway.attempts import Fail, Mode
from llmserve.gateway.call import Arrival, Call
from llmserve.gateway.channel import Channel
from llmserve.gateway.codec import RequestCodec
from llmserve.gateway.metrics import GatewayMetrics
from llmserve.workers.engine.wire import API
from tests.workers.world import body


class SimCodec(RequestCodec):
    """A greedy request: its tokens depend on those before and on nothing else."""

    mode = Mode.RESUME
    whole_output = False

    def __init__(self, prompt: Sequence[int], max_tokens: int) -> None:
        self._prompt = list(prompt)
        self.prompt_tokens = len(self._prompt)
        self.max_tokens = max_tokens

    def body(self, request_id: str, delivered: Sequence[int]) -> bytes:
        return body([*self._prompt, *delivered], self.max_tokens - len(delivered))


@dataclass(eq=False)
class Answer:
    """What became of one request."""

    prompt: list[int]
    max_tokens: int
    asked_s: float = field(default_factory=time.monotonic)
    tokens: list[int] = field(default_factory=list)
    reason: Reason | None = None
    error: str = ""
    """Of a request that was accepted; one that was not raises."""
    code: str = ""
    ended_s: float = 0.0
    heard_s: float = 0.0
    """When the last tokens came."""
    longest_pause_s: float = 0.0
    """Between two arrivals of tokens."""
    done: asyncio.Event = field(default_factory=asyncio.Event)


class SimGateway:
    """``open``, then ``send`` or ``ask``."""

    def __init__(
        self, bus: Bus, api: str = API, codec: Callable[[Sequence[int], int], RequestCodec] = SimCodec
    ) -> None:
        """``codec`` makes what engines of ``api`` read of a prompt and a length."""
        self._codec = codec
        self.member = f"gateway-{secrets.token_hex(4)}"
        self.answers: list[Answer] = []
        self._open: dict[str, Answer] = {}
        self._bus = bus
        self._count = 0
        self._beater = Beater(bus, self._heartbeat)
        self.channel = Channel(
            bus,
            self.member,
            api,
            GatewayMetrics(CollectorRegistry()),
            on_arrivals=self._arrive,
            on_failure=self._fail,
        )

    async def open(self) -> None:
        await self.channel.start()
        self._beater.start()

    async def close(self) -> None:
        await self.channel.stop()
        await self._beater.stop()
        self._bus.publish(self._bus.subjects.heartbeats, self._heartbeat(leaving=True))

    async def send(self, prompt: Sequence[int], max_tokens: int, tenant: str = "default") -> Answer:
        """Returns when the request is accepted. Raises ``BusError`` if it is not."""
        self._count += 1
        local_id, answer = str(self._count), Answer(list(prompt), max_tokens)
        self._open[local_id] = answer
        try:
            await self.channel.open(
                local_id, tenant, "interactive", self._codec(prompt, max_tokens), time.monotonic()
            )
        except BusError:
            del self._open[local_id]
            raise
        self.answers.append(answer)
        return answer

    async def ask(self, prompt: Sequence[int], max_tokens: int, tenant: str = "default") -> Answer:
        """Returns when the request is over."""
        answer = await self.send(prompt, max_tokens, tenant)
        await answer.done.wait()
        return answer

    def _arrive(self, arrivals: list[Arrival]) -> None:
        for arrival in arrivals:
            answer, now = self._open[arrival.local_id], time.monotonic()
            if answer.tokens:
                answer.longest_pause_s = max(answer.longest_pause_s, now - answer.heard_s)
            answer.heard_s = now
            answer.tokens += arrival.delta.tokens[arrival.skip :]
            if arrival.reason is not None:
                answer.reason = arrival.reason
                self._over(arrival.local_id)

    def _fail(self, call: Call, fail: Fail) -> None:
        answer = self._open[call.local_id]
        answer.error, answer.code = fail.message, fail.code
        self._over(call.local_id)

    def _over(self, local_id: str) -> None:
        answer = self._open.pop(local_id)
        answer.ended_s = time.monotonic()
        answer.done.set()

    def _heartbeat(self, *, leaving: bool = False) -> Heartbeat:
        return Heartbeat(member=self.member, role=Role.GATEWAY, host="test", pid=os.getpid(), leaving=leaving)
