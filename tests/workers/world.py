"""A worker on a bus in memory, with the test in the places of router and gateway."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec
from prometheus_client import CollectorRegistry

from llmserve.bus.memory import MemoryBroker
from llmserve.bus.messages import (
    AnyMessage,
    Delta,
    Deltas,
    Grant,
    HandedOff,
    Heartbeat,
    Message,
    Request,
    Role,
    Stage,
    encode,
)
from llmserve.workers.engine.simulated import SimulatedEngine, SimulatedSettings, Timing
from llmserve.workers.engine.simulated_sequence import Limits, digest_of, next_token
from llmserve.workers.engine.wire import API
from llmserve.workers.metrics import WorkerMetrics
from llmserve.workers.reports import Identity, stage_of
from llmserve.workers.worker import Worker, WorkerSettings

FAST = Timing(step_s=0.001, prefill_s_per_token=0, decode_s_per_request=0, transfer_bits_per_s=1e15)
M = TypeVar("M", bound=Message)


def body(prompt: list[int], max_tokens: int | None = 8, **sampling: object) -> bytes:
    """As vLLM encodes a request; ``test_wire`` compares."""
    return msgspec.msgpack.encode(["r", prompt, None, {"max_tokens": max_tokens, **sampling}, None, 0.0])


def expected(prompt: list[int], count: int) -> list[int]:
    """The tokens that follow a prompt, computed the slow way."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(digest_of(tokens)))
    return tokens[len(prompt) :]


def settings(
    *, slots: int = 8, pages: int = 64, lease_s: float = 30.0, timing: Timing = FAST, step_tokens: int = 64
) -> SimulatedSettings:
    limits = Limits(slots=slots, step_tokens=step_tokens, pages=pages, page_tokens=16, max_model_len=1024)
    return SimulatedSettings(limits=limits, timing=timing, lease_s=lease_s, transfer_timeout_s=2.0)


def request(request_id: str = "r1", prompt: list[int] | None = None, **fields: object) -> Request:
    prompt = prompt or [1, 2, 3, 4, 5]
    max_tokens = fields.pop("max_tokens", 8)
    defaults: dict[str, object] = {
        "request_id": request_id,
        "gateway": "g1",
        "attempt": 0,
        "created_s": 0.0,
        "prompt_tokens": len(prompt),
        "max_tokens": max_tokens,
        "api": API,
        "body": body(prompt, max_tokens),  # type: ignore[arg-type]
    }
    return Request(**(defaults | fields))  # type: ignore[arg-type]


@dataclass
class Heard:
    """Everything on one subject, in order."""

    messages: list[AnyMessage] = field(default_factory=list)

    def of(self, kind: type[M]) -> list[M]:
        return [message for message in self.messages if isinstance(message, kind)]


async def until(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.001)


class World:
    """A broker, the router's and a gateway's ears, and any number of workers."""

    def __init__(self) -> None:
        self.broker = MemoryBroker()
        self.bus = self.broker.bus("test")
        self.subjects = self.bus.subjects
        self.events = Heard()
        self.beats = Heard()
        self.gateway = Heard()
        self.log: list[AnyMessage] = []
        self.workers: list[tuple[Worker, asyncio.Task[None]]] = []
        self._seqs = itertools.count(1)

    async def open(self) -> None:
        heard = ((self.subjects.events, self.events), (self.subjects.heartbeats, self.beats))
        for subject, ear in (*heard, (self.subjects.gateway("g1"), self.gateway)):

            def hear(message: AnyMessage, ear: Heard = ear) -> None:
                ear.messages.append(message)
                if ear is not self.beats:
                    self.log.append(message)

            await self.bus.subscribe(subject, hear)

    async def worker(
        self, role: Role = Role.BOTH, engine: SimulatedEngine | None = None, **options: object
    ) -> Worker:
        engine = engine or SimulatedEngine(settings(**options))  # type: ignore[arg-type]
        member = f"w{len(self.workers)}"
        made = Worker(
            self.broker.bus(member),
            engine,
            Identity(member, role),
            WorkerSettings(lease_s=engine.settings.lease_s),
            WorkerMetrics(CollectorRegistry()).of(member, role),
        )
        await made.start()
        self.workers.append((made, asyncio.create_task(made.run())))
        return made

    async def grant(
        self,
        worker: Worker,
        item: Request,
        *,
        epoch: int = 1,
        seq: int | None = None,
        handoff: HandedOff | None = None,
        inline: bool = True,
        stage: Stage | None = None,
    ) -> int:
        if seq is None:
            seq = await self.bus.accept(item, "t", "i")
        identity = worker._identity
        grant = Grant(
            epoch=epoch,
            seq=seq,
            tenant="t",
            klass="i",
            stage=stage or stage_of(identity.role),
            attempt=item.attempt,
            request=encode(item) if inline else b"",
            handoff=encode(handoff) if handoff else b"",
        )
        self.bus.publish(self.subjects.work(identity.member), grant)
        return seq

    def control(self, message: Message) -> None:
        self.bus.publish(self.subjects.control, message)

    def deltas(self, request_id: str = "r1") -> list[Delta]:
        return [d for message in self.gateway.of(Deltas) for d in message.items if d.request_id == request_id]

    def tokens(self, request_id: str = "r1") -> list[int]:
        """Those delivered, each at its offset."""
        output: list[int] = []
        for delta in self.deltas(request_id):
            assert delta.offset == len(output)
            output += delta.tokens
        return output

    def last_beat(self) -> Heartbeat:
        return self.beats.of(Heartbeat)[-1]

    async def close(self) -> None:
        for worker, task in self.workers:
            await worker.stop()
            await asyncio.gather(task, return_exceptions=True)
