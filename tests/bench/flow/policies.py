"""Orders to compare: who is started when a slot is free.

All see the same jobs. First come first served, round robin and deficit round robin as in the textbooks; deficit round
robin (Shreedhar and Varghese, SIGCOMM 1995) is even told real costs beforehand, which nobody can know. The virtual
token counter is Algorithm 2 of Sheng et al. (OSDI 2024, arXiv 2401.00588) with weights: prompts are charged when they
start, output tokens as they come. Ours is the router's real core, told what a worker would tell it.
"""

from __future__ import annotations

import heapq
import random
from abc import ABC, abstractmethod
from collections import deque

from llmserve.bus.base import StoredRequest
from llmserve.bus.flow.actions import NotifyGateway, SendGrant
from llmserve.bus.flow.core import RouterCore
from llmserve.bus.flow.events import Tick
from llmserve.bus.flow.settings import RouterSettings
from llmserve.bus.messages import Accepted, Finished, Heartbeat, Reason, Request, Role, Running, Stage
from tests.bench.flow.arrivals import MAX_TOKENS, OUTPUT_WEIGHT, Job, Scenario

BEAT_S = 1.0
"""Between heartbeats of the simulated worker and gateway."""


class Policy(ABC):
    """Told of arrivals and ends, asked whom to start."""

    name = ""

    @abstractmethod
    def __init__(self, scenario: Scenario) -> None: ...

    @abstractmethod
    def arrive(self, job: Job, now_s: float) -> None: ...

    @abstractmethod
    def start(self, free: int, now_s: float) -> list[Job]:
        """At most ``free`` jobs, which run from now on."""

    @abstractmethod
    def end(self, job: Job, now_s: float) -> None: ...


class Fcfs(Policy):
    name = "FCFS"

    def __init__(self, scenario: Scenario) -> None:
        self._queue: deque[Job] = deque()

    def arrive(self, job: Job, now_s: float) -> None:
        self._queue.append(job)

    def start(self, free: int, now_s: float) -> list[Job]:
        return [self._queue.popleft() for _ in range(min(free, len(self._queue)))]

    def end(self, job: Job, now_s: float) -> None:
        return


class RoundRobin(Policy):
    """One request of each tenant in turn."""

    name = "round robin"

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._queues: dict[str, deque[Job]] = {}
        self._turns: deque[str] = deque()

    def arrive(self, job: Job, now_s: float) -> None:
        queue = self._queues.setdefault(job.tenant, deque())
        if not queue:
            self._turns.append(job.tenant)
        queue.append(job)

    def start(self, free: int, now_s: float) -> list[Job]:
        started: list[Job] = []
        while len(started) < free and self._turns:
            started.append(self._next())
        return started

    def end(self, job: Job, now_s: float) -> None:
        return

    def _next(self) -> Job:
        tenant = self._turns.popleft()
        job = self._queues[tenant].popleft()
        if self._queues[tenant]:
            self._turns.append(tenant)
        return job


class DeficitRoundRobin(RoundRobin):
    """A quantum of real cost for each tenant in turn."""

    name = "deficit rr"
    QUANTUM = 1000.0

    def __init__(self, scenario: Scenario) -> None:
        super().__init__(scenario)
        self._deficits: dict[str, float] = {}
        self._visiting = False

    def _next(self) -> Job:
        while True:
            tenant = self._turns[0]
            queue = self._queues[tenant]
            deficit = self._deficits.get(tenant, 0.0)
            if not self._visiting:
                deficit += self.QUANTUM * self._scenario.weight(tenant)
                self._visiting = True
            if queue[0].cost <= deficit:
                job = queue.popleft()
                self._deficits[tenant] = deficit - job.cost
                if not queue:
                    self._deficits[tenant] = 0.0
                    self._turns.popleft()
                    self._visiting = False
                return job
            self._deficits[tenant] = deficit
            self._turns.rotate(-1)
            self._visiting = False


class Vtc(Policy):
    name = "VTC"

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._queues: dict[str, deque[Job]] = {}
        self._counters: dict[str, float] = {}
        self._running: dict[str, dict[int, tuple[Job, float]]] = {}
        self._heap: list[tuple[float, str]] = []
        """Tenants with queued jobs, by what their counters were; counters never fall."""
        self._left_last = ""

    def arrive(self, job: Job, now_s: float) -> None:
        queue = self._queues.setdefault(job.tenant, deque())
        if not queue:
            least = self._least(now_s)
            floor = self._counter(least or self._left_last, now_s)
            lift = floor - self._counter(job.tenant, now_s)
            self._counters[job.tenant] = self._counters.get(job.tenant, 0.0) + max(0.0, lift)
            heapq.heappush(self._heap, (self._counter(job.tenant, now_s), job.tenant))
        queue.append(job)

    def start(self, free: int, now_s: float) -> list[Job]:
        started: list[Job] = []
        while len(started) < free and (tenant := self._least(now_s)):
            job = self._queues[tenant].popleft()
            self._counters[tenant] = self._counters.get(tenant, 0.0) + job.prompt_tokens / self._scenario.weight(
                tenant
            )
            self._running.setdefault(tenant, {})[job.seq] = (job, now_s)
            if not self._queues[tenant]:
                heapq.heappop(self._heap)
                self._left_last = tenant
            started.append(job)
        return started

    def end(self, job: Job, now_s: float) -> None:
        del self._running[job.tenant][job.seq]
        self._counters[job.tenant] += OUTPUT_WEIGHT * job.output_tokens / self._scenario.weight(job.tenant)

    def _counter(self, tenant: str, now_s: float) -> float:
        """Charged by now: a slot computes the prompt first, then token by token."""
        decoded = 0.0
        for job, since_s in self._running.get(tenant, {}).values():
            done = (now_s - since_s) * self._scenario.slot_rate - job.prompt_tokens
            decoded += min(max(0.0, done), OUTPUT_WEIGHT * job.output_tokens)
        return self._counters.get(tenant, 0.0) + (decoded / self._scenario.weight(tenant) if decoded else 0.0)

    def _least(self, now_s: float) -> str:
        """The tenant with queued jobs and the least counter, at the top of the heap; empty if there is none."""
        while self._heap:
            known, tenant = self._heap[0]
            counter = self._counter(tenant, now_s)
            if counter <= known:
                return tenant
            heapq.heapreplace(self._heap, (counter, tenant))
        return ""


class Ours(Policy):
    """``RouterCore``, with one worker of both roles that has all slots and confirms at once."""

    name = "ours"

    def __init__(self, scenario: Scenario) -> None:
        # Overload is part of the scenarios: what waits for long must be served all the same, as by the others.
        settings = RouterSettings(tenants=scenario.tenants, queue_deadline_s=1e9)
        self.core = RouterCore(settings, random.Random(1))
        self.core.begin("r0", 1)
        self._slots = scenario.slots
        self._jobs: dict[int, Job] = {}
        self._running: dict[int, Job] = {}
        self._beat_s = 0.0
        self._beat(0.0)

    def arrive(self, job: Job, now_s: float) -> None:
        self._jobs[job.seq] = job
        request = Request(
            request_id=f"q{job.seq}",
            gateway="g0",
            attempt=0,
            created_s=0.0,
            prompt_tokens=job.prompt_tokens,
            max_tokens=MAX_TOKENS,
            api="a1",
            body=b"",
        )
        self.core.handle(StoredRequest(job.seq, job.tenant, "interactive", request, b"-"), now_s)

    def start(self, free: int, now_s: float) -> list[Job]:
        while self._beat_s <= now_s:
            self._beat(self._beat_s)
            self._beat_s += BEAT_S
        started: list[Job] = []
        for action in self.core.dispatch(now_s):
            assert not isinstance(action, NotifyGateway), f"not served: {action}"
            if isinstance(action, SendGrant):
                job = self._jobs.pop(action.grant.seq)
                self._running[job.seq] = job
                started.append(job)
                self.core.handle(
                    Accepted(worker="w0", seq=job.seq, attempt=0, stage=action.grant.stage, epoch=1), now_s
                )
        return started

    def end(self, job: Job, now_s: float) -> None:
        del self._running[job.seq]
        ended = Finished(
            worker="w0",
            seq=job.seq,
            request_id=f"q{job.seq}",
            attempt=0,
            stage=Stage.WHOLE,
            reason=Reason.STOP,
            prompt_tokens=job.prompt_tokens,
            output_tokens=job.output_tokens,
        )
        self.core.handle(ended, now_s)

    def _beat(self, now_s: float) -> None:
        lines = [
            Running(
                seq=job.seq,
                attempt=0,
                stage=Stage.WHOLE,
                tenant=job.tenant,
                prompt_tokens=job.prompt_tokens,
                max_tokens=MAX_TOKENS,
            )
            for job in self._running.values()
        ]
        worker = Heartbeat(
            member="w0",
            role=Role.BOTH,
            host="h",
            pid=1,
            api="a1",
            fingerprint="f1",
            slots=self._slots,
            pages_total=0,
            page_tokens=16,
            page_bytes=1000,
            max_model_len=1 << 20,
            epoch=1,
            running=lines,
        )
        self.core.handle(worker, now_s)
        self.core.handle(Heartbeat(member="g0", role=Role.GATEWAY, host="h", pid=1), now_s)
        self.core.handle(Tick(), now_s)


POLICIES: tuple[type[Policy], ...] = (Fcfs, RoundRobin, DeficitRoundRobin, Vtc, Ours)
