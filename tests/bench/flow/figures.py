"""What a run did to its tenants, from the times at which its jobs started."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from tests.bench.flow.arrivals import Job
from tests.bench.flow.simulate import Run

Array = npt.NDArray[np.float64]
SAMPLES = 20_000
"""Moments at which lags are looked at."""


def percentile(values: Iterable[float], part: float) -> float:
    """NaN without values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(part * len(ordered)) - 1)] if ordered else math.nan


def mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed) if listed else math.nan


def waits_s(run: Run, jobs: Iterable[Job]) -> list[float]:
    """From arrival to start; what never started has waited until the end."""
    return [run.started_s.get(job.seq, run.scenario.end_s) - job.arrives_s for job in jobs]


def times_s(run: Run, jobs: Iterable[Job]) -> list[float]:
    """From arrival to the end of service."""
    return [min(run.ended_s(job), run.scenario.end_s) - job.arrives_s for job in jobs]


def ttfts_s(run: Run, jobs: Iterable[Job]) -> list[float]:
    """From arrival to the end of the prompt."""
    jobs = list(jobs)
    rate = run.scenario.slot_rate
    return [wait_s + job.prompt_tokens / rate for wait_s, job in zip(waits_s(run, jobs), jobs, strict=True)]


def service(run: Run) -> dict[str, float]:
    """Cost that each tenant was served from ``from_s`` on, partly served jobs included."""
    scenario, served = run.scenario, dict.fromkeys(run.scenario.tenants, 0.0)
    for job in scenario.jobs:
        if job.seq in run.started_s:
            since_s, until_s = max(run.started_s[job.seq], scenario.from_s), min(run.ended_s(job), scenario.end_s)
            served[job.tenant] += max(0.0, until_s - since_s) * scenario.slot_rate
    return served


def fair(run: Run, served: dict[str, float]) -> dict[str, float]:
    """The weighted max-min fair division of all that was served: nobody gets more than was asked for."""
    scenario = run.scenario
    asked = dict.fromkeys(scenario.tenants, 0.0)
    for job in scenario.jobs:
        asked[job.tenant] += job.cost
    left, parts = sum(served.values()), dict[str, float]()
    order = sorted(asked, key=lambda tenant: asked[tenant] / scenario.weight(tenant))
    weights = sum(map(scenario.weight, order))
    for tenant in order:
        parts[tenant] = min(asked[tenant], left * scenario.weight(tenant) / weights)
        left -= parts[tenant]
        weights -= scenario.weight(tenant)
    return parts


def share_error(run: Run) -> float:
    """Largest difference between what a tenant got and its share, in parts of its share."""
    served = service(run)
    weights = sum(map(run.scenario.weight, served))
    shares = {tenant: sum(served.values()) * run.scenario.weight(tenant) / weights for tenant in served}
    return max(abs(served[tenant] - shares[tenant]) / shares[tenant] for tenant in served)


def jain(run: Run) -> float:
    """Jain's index of service over fair service: 1 is perfectly fair."""
    served = service(run)
    parts = fair(run, served)
    ratios = [served[tenant] / parts[tenant] for tenant in served if parts[tenant] > 0]
    squares = sum(ratio * ratio for ratio in ratios)
    return sum(ratios) ** 2 / (len(ratios) * squares) if squares else 0.0


def served_by(starts: Array, ends: Array, at: Array, rate: float) -> Array:
    """Cost served until each moment: the sum over jobs of ``clip(at - start, 0, end - start)``."""
    total = np.zeros_like(at)
    for times, sign in ((np.sort(starts), 1.0), (np.sort(ends), -1.0)):
        sums = np.concatenate(([0.0], np.cumsum(times)))
        number = np.searchsorted(times, at, side="right")
        total += sign * (number * at - sums[number])
    return total * rate


def lag_over_bound(run: Run) -> float:
    """Worst difference of service per weight in any interval in which two tenants both have requests queued.

    Over the bound of Sheng et al. (arXiv 2401.00588): twice the larger of the largest request and of all that was in
    flight at once, per weight.
    """
    scenario = run.scenario
    moments = sorted({job.arrives_s for job in scenario.jobs} | set(run.started_s.values()))
    moments = [moment for moment in moments if moment <= scenario.end_s]
    at = np.array(moments[:: max(1, len(moments) // SAMPLES)])
    flying = np.zeros_like(at)
    largest, per_weight, queued = 0.0, dict[str, Array](), dict[str, npt.NDArray[np.bool_]]()
    for tenant in scenario.tenants:
        weight = scenario.weight(tenant)
        jobs = [job for job in scenario.jobs if job.tenant == tenant]
        ran = [job for job in jobs if job.seq in run.started_s]
        arrivals = np.sort(np.array([job.arrives_s for job in jobs]))
        starts = np.array([run.started_s[job.seq] for job in ran])
        ends = np.array([run.ended_s(job) for job in ran])
        costs = np.array([job.cost for job in ran], dtype=np.float64) / weight
        largest = max(largest, *(job.cost / weight for job in jobs)) if jobs else largest
        per_weight[tenant] = served_by(starts, ends, at, scenario.slot_rate) / weight
        queued[tenant] = np.searchsorted(arrivals, at, side="right") > np.searchsorted(
            np.sort(starts), at, side="right"
        )
        for times, sign in ((starts, 1.0), (ends, -1.0)):
            order = np.argsort(times)
            sums = np.concatenate(([0.0], np.cumsum(costs[order])))
            flying += sign * sums[np.searchsorted(times[order], at, side="right")]
    worst = 0.0
    for one, other in itertools.combinations(scenario.tenants, 2):
        both = queued[one] & queued[other]
        edges = np.flatnonzero(np.diff(np.concatenate(([False], both, [False])).astype(np.int8)))
        difference = per_weight[one] - per_weight[other]
        for begin, end in zip(edges[::2], edges[1::2], strict=True):
            part = difference[begin:end]
            worst = max(worst, float(part.max() - part.min()))
    return worst / (2 * max(largest, float(flying.max())))
