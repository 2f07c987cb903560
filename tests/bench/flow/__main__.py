"""``python -m tests.bench.flow``: five orders on the same arrivals in virtual time, the core's rate, the real bus.

Adds to ``build/bench/flow.json``: ``share_error_simulated``, ``lag_over_bound`` (worst of all scenarios with it),
``victim_p99_ratio`` (p99 wait beside a flood over the one alone on the part of the pool that is the victim's),
``victim_p99_wait_s``, ``victim_entitled_p99_wait_s``, ``victim_p99_ttft_ratio`` and ``victim_p99_end_ratio`` (time to
the end of the prompt, and of all, beside the flood over without it on the whole pool), ``victim_mean_slowdown`` and
``victim_p99_slowdown`` (of single requests: time to the end over the same without a wait), ``srpt_mean_wait_ratio``,
``srpt_longest_wait_s``, ``slo_met``, ``dispatch_per_s``, ``tenants_5000_rate_ratio``, the CPU time of an arrival and
of a decision with 10 and 5,000 tenants (``arrival_us``, ``tenants_5000_arrival_us``, ...), the whole table under
``table``; and from the real router and bus ``share_error``, ``dispatch_p50_ms`` and ``dispatch_p99_ms`` (publish to
worker-has-it), beside ``stored_*_ms`` (publish to the server's acknowledgement) and ``floor_*_ms`` (the same hops
through nats-py, with nothing decided), ``dispatch_over_floor`` and ``router_us_per_request``, the CPU time of the
router's process: medians of ``--rounds``. ``--only dispatch`` measures these and leaves the rest as it is.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable

from tests.bench.flow import arrivals
from tests.bench.flow.arrivals import TRACE, Job, Scenario
from tests.bench.flow.figures import jain, lag_over_bound, mean, percentile, share_error, times_s, ttfts_s, waits_s
from tests.bench.flow.policies import POLICIES, Policy
from tests.bench.flow.rate import costs
from tests.bench.flow.real import measure_dispatch, measure_share
from tests.bench.flow.simulate import Run, simulate
from tests.processes import ROOT

ROUNDS = 3
MOST_FOR_LAGS = 16
"""Tenants up to which all pairs are compared."""
COLUMNS = (
    ("share_error", "share err", 100.0, "%"),
    ("lag_over_bound", "lag/bound", 1.0, ""),
    ("victim_p99_ratio", "victim p99", 1.0, "x"),
    ("victim_p99_wait_s", "its wait", 1.0, "s"),
    ("victim_p99_ttft_ratio", "its TTFT", 1.0, "x"),
    ("victim_p99_end_ratio", "its end", 1.0, "x"),
    ("slo_met", "SLO met", 100.0, "%"),
    ("short_mean_s", "short mean", 1.0, "s"),
    ("short_p99_s", "p99", 1.0, "s"),
    ("long_mean_s", "long mean", 1.0, "s"),
    ("long_p99_s", "p99", 1.0, "s"),
    ("longest_s", "longest", 1.0, "s"),
    ("jain", "Jain", 1.0, ""),
    ("arrival_us", "arrival", 1.0, "us"),
    ("decision_us", "decision", 1.0, "us"),
)


def row(run: Run, kind: type[Policy]) -> dict[str, float]:
    scenario = run.scenario
    short = waits_s(run, (job for job in scenario.jobs if job.cost < scenario.long_cost))
    long = waits_s(run, (job for job in scenario.jobs if job.cost >= scenario.long_cost))
    figures = {
        "mean_s": mean(short + long),
        "short_mean_s": mean(short),
        "short_p99_s": percentile(short, 0.99),
        "long_mean_s": mean(long),
        "long_p99_s": percentile(long, 0.99),
        "longest_s": max(short + long),
        "arrival_us": run.arrival_s * 1e6,
        "decision_us": run.decision_s * 1e6,
    }
    if len(run.started_s) < len(scenario.jobs):  # else all were served what they asked for
        figures["jain"] = jain(run)
    if scenario.backlogged:
        figures["share_error"] = share_error(run)
    if 1 < len(scenario.tenants) <= MOST_FOR_LAGS:
        figures["lag_over_bound"] = lag_over_bound(run)
    if scenario.victims:
        figures |= victims(run, kind)
    if scenario.slo:
        bound_s = scenario.tenants[scenario.slo].ttft_slo_s or math.inf
        mine = waits_s(run, (job for job in scenario.jobs if job.tenant == scenario.slo))
        figures["slo_met"] = mean(float(wait_s <= bound_s) for wait_s in mine)
    return {key: round(value, 5) for key, value in figures.items() if not math.isnan(value)}


def victims(run: Run, kind: type[Policy]) -> dict[str, float]:
    """Victims beside the flood: their wait against running alone on what they are entitled to, where they wait for
    themselves; the rest against the whole pool without the flood, on which they never wait."""
    entitled: list[float] = []
    for tenant in sorted(run.scenario.victims):
        own = arrivals.entitled(run.scenario, tenant)
        entitled += waits_s(simulate(own, kind), own.jobs)
    wait_s, entitled_s = victims_p99(run, waits_s), percentile(entitled, 0.99)
    figures = {
        "victim_p99_ratio": wait_s / entitled_s,
        "victim_p99_wait_s": wait_s,
        "victim_entitled_p99_wait_s": entitled_s,
    }
    alone = simulate(arrivals.flood(times=0), kind)
    for key, times in (("victim_p99_ttft_ratio", ttfts_s), ("victim_p99_end_ratio", times_s)):
        figures[key] = victims_p99(run, times) / victims_p99(alone, times)
    jobs = victims_jobs(run)
    rate = run.scenario.slot_rate
    slowdowns = [1 + wait_s * rate / job.cost for wait_s, job in zip(waits_s(run, jobs), jobs, strict=True)]
    figures["victim_mean_slowdown"] = mean(slowdowns)
    figures["victim_p99_slowdown"] = percentile(slowdowns, 0.99)
    return figures


def victims_p99(run: Run, times: Callable[[Run, list[Job]], list[float]]) -> float:
    return percentile(times(run, victims_jobs(run)), 0.99)


def victims_jobs(run: Run) -> list[Job]:
    return [job for job in run.scenario.jobs if job.tenant in run.scenario.victims]


def show(scenario: Scenario, rows: dict[str, dict[str, float]]) -> None:
    columns = [column for column in COLUMNS if any(column[0] in figures for figures in rows.values())]
    print(f"\n{scenario.name}: {len(scenario.jobs)} requests, {len(scenario.tenants)} tenants")
    print(" " * 12 + "".join(f"{title:>12}" for _, title, _, _ in columns))
    for policy, figures in rows.items():
        cells = (f"{figures[key] * scale:.4g} {unit}" if key in figures else "" for key, _, scale, unit in columns)
        print(f"{policy:<12}" + "".join(f"{cell.strip():>12}" for cell in cells))


def compare() -> dict[str, dict[str, dict[str, float]]]:
    """Rows by scenario and policy."""
    table = {}
    makers = (
        arrivals.weights,
        arrivals.flood,
        arrivals.bimodal,
        arrivals.slo,
        arrivals.many,
        arrivals.conversation,
    )
    for make in makers:
        scenario = make()
        if scenario is None:
            print(f"\nMooncake conversation: skipped, there is no {TRACE.name} (LLMSERVE_TRACES names its folder)")
            continue
        rows = {kind.name: row(simulate(scenario, kind), kind) for kind in POLICIES}
        show(scenario, rows)
        table[scenario.name] = rows
    return table


def headline(table: dict[str, dict[str, dict[str, float]]]) -> dict[str, float]:
    ours = {name: rows["ours"] for name, rows in table.items()}
    flood = next(rows for rows in ours.values() if "victim_p99_ratio" in rows)
    bimodal = next(rows for name, rows in table.items() if name.startswith("bimodal"))
    few, many = costs()
    return {
        "share_error_simulated": next(rows["share_error"] for rows in ours.values() if "share_error" in rows),
        "lag_over_bound": max(rows["lag_over_bound"] for rows in ours.values() if "lag_over_bound" in rows),
        **{key: value for key, value in flood.items() if key.startswith("victim_")},
        "srpt_mean_wait_ratio": bimodal["ours"]["mean_s"] / bimodal["FCFS"]["mean_s"],
        "srpt_longest_wait_s": bimodal["ours"]["longest_s"],
        "slo_met": next(rows["slo_met"] for rows in ours.values() if "slo_met" in rows),
        "dispatch_per_s": few.rate,
        "tenants_5000_rate_ratio": many.rate / few.rate,
        "arrival_us": few.arrival_us,
        "decision_us": few.decision_us,
        "tenants_5000_arrival_us": many.arrival_us,
        "tenants_5000_decision_us": many.decision_us,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["dispatch"], help="this part; the other figures stay")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="measurements of the way to a worker")
    options = parser.parse_args()
    known: dict[str, object] = {}
    figures: dict[str, float] = {}
    target = ROOT / "build" / "bench" / "flow.json"
    if target.exists():
        known = json.loads(target.read_text())
    if options.only is None:
        known["table"] = table = compare()
        figures = headline(table) | measure_share()
    figures |= measure_dispatch(options.rounds)
    target.parent.mkdir(parents=True, exist_ok=True)
    known |= {key: round(value, 4) for key, value in figures.items()}
    target.write_text(json.dumps(known, indent=1) + "\n")
    print()
    for key, value in figures.items():
        print(f"{key:<36}{value:>10.4g}")


if __name__ == "__main__":
    main()
