"""A pool of slots in virtual time, and when it started what."""

from __future__ import annotations

import heapq
import math
import time
from dataclasses import dataclass, field

from tests.bench.flow.arrivals import Job, Scenario
from tests.bench.flow.policies import Policy


@dataclass
class Run:
    """One policy on one scenario."""

    scenario: Scenario
    policy: str
    started_s: dict[int, float] = field(default_factory=dict)
    """By sequence, of what was started."""
    arriving_s: float = 0.0
    """Real time that the policy took to queue what arrived."""
    deciding_s: float = 0.0
    """Real time that it took for starts and ends."""

    def ended_s(self, job: Job) -> float:
        """Infinite if it was not started."""
        started_s = self.started_s.get(job.seq, math.inf)
        return started_s + job.service_s(self.scenario.slot_rate)

    @property
    def decision_s(self) -> float:
        """Real time for the start and the end of one request."""
        return self.deciding_s / max(1, len(self.started_s))

    @property
    def arrival_s(self) -> float:
        """Real time to queue one request."""
        return self.arriving_s / max(1, len(self.scenario.jobs))


def simulate(scenario: Scenario, kind: type[Policy]) -> Run:
    """Serve the scenario's jobs until its end; a slot that started a job keeps it."""
    run, policy, clock = Run(scenario, kind.name), kind(scenario), time.perf_counter
    running: list[tuple[float, int, Job]] = []
    arrivals, jobs = 0, scenario.jobs
    while arrivals < len(jobs) or running:
        next_arrival_s = jobs[arrivals].arrives_s if arrivals < len(jobs) else math.inf
        now_s = min(next_arrival_s, running[0][0] if running else math.inf)
        if now_s >= scenario.end_s:
            break
        began_s = clock()
        while arrivals < len(jobs) and jobs[arrivals].arrives_s <= now_s:
            policy.arrive(jobs[arrivals], now_s)
            arrivals += 1
        arrived_s = clock()
        while running and running[0][0] <= now_s:
            policy.end(heapq.heappop(running)[2], now_s)
        if len(running) == scenario.slots:
            run.arriving_s += arrived_s - began_s
            continue
        started = policy.start(scenario.slots - len(running), now_s)
        run.arriving_s += arrived_s - began_s
        run.deciding_s += clock() - arrived_s
        for job in started:
            assert job.seq not in run.started_s, f"{job} started twice"
            run.started_s[job.seq] = now_s
            heapq.heappush(running, (now_s + job.service_s(scenario.slot_rate), job.seq, job))
        assert len(running) <= scenario.slots, "more than the pool has"
    return run
