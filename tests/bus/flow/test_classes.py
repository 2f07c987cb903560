"""Specification of the batch class, of SLO leads, and of the budgets for KV memory and KV transfers."""

from __future__ import annotations

import random

from llmserve.bus.flow.actions import Action, SendGrant
from llmserve.bus.flow.bucket import Bucket
from llmserve.bus.flow.core import RouterCore
from llmserve.bus.flow.settings import RouterSettings, TenantSettings
from llmserve.bus.messages import Finished, HandedOff, Reason, Rejected, Role, Stage
from tests.bus.flow.test_core import Driver, accepted, finished, grants, notices, queued
from tests.bus.flow.world import beat, request, stored


def batch(seq: int, tenant: str = "b", prompt_tokens: int = 10, max_tokens: int = 10) -> object:
    return stored(seq, tenant, request(f"q{seq}", 0, prompt_tokens, max_tokens), "batch")


def seqs(actions: list[Action]) -> list[int]:
    return [seq for _, seq, _ in grants(actions)]


def test_batch_work_runs_only_in_slots_that_interactive_work_leaves() -> None:
    d = Driver()
    d.tell(batch(1), batch(2), queued(3), queued(4))  # type: ignore[arg-type]
    assert seqs(d.tell(beat("w", Role.BOTH, slots=3))) == [3, 4, 1]


def test_batch_work_never_gets_the_slots_that_are_spared_for_interactive_work() -> None:
    d = Driver(RouterSettings(min_decode_slots=2))
    d.tell(*(batch(seq) for seq in range(1, 6)))  # type: ignore[arg-type]
    assert seqs(d.tell(beat("w", Role.BOTH, slots=4))) == [1, 2]
    assert seqs(d.tell(queued(10), queued(11))) == [10, 11]


def test_without_a_slot_for_it_batch_work_is_not_prefilled_for_decode_workers_either() -> None:
    d = Driver(RouterSettings(min_decode_slots=4))
    d.tell(beat("p", Role.PREFILL), beat("d", Role.DECODE, slots=4))
    assert seqs(d.tell(batch(1))) == []  # type: ignore[arg-type]
    assert seqs(d.tell(queued(2))) == [2]


def serve_backlog(settings: RouterSettings, rounds: int) -> dict[str, float]:
    """Cost served by class while both always wait, on four slots."""
    core, rng, now_s, seq = RouterCore(settings, random.Random(1)), random.Random(2), 0.0, 0
    core.begin("r0", 1)
    core.handle(beat("w", Role.BOTH, pages_total=0), now_s)
    running: list[tuple[int, str, int]] = []
    cost = {"batch": 0.0, "interactive": 0.0}
    sizes: dict[int, int] = {}
    for klass in ("interactive", "batch"):
        for _ in range(rounds):
            seq += 1
            sizes[seq] = rng.choice((10, 50, 200))
            of = request(f"q{seq}", 0, sizes[seq], 1)
            core.handle(stored(seq, klass[0], of, klass), now_s)
    for _ in range(rounds // 2):
        for action in core.dispatch(now_s):
            if isinstance(action, SendGrant):
                running.append((action.grant.seq, action.grant.klass, sizes[action.grant.seq]))
                cost[action.grant.klass] += sizes[action.grant.seq] + 2
        number, _, _ = running.pop(rng.randrange(len(running)))
        core.handle(finished("w", number, Stage.WHOLE), now_s)
        core.check()
    return cost


def test_batch_work_gets_its_guaranteed_share_while_interactive_work_waits_and_no_more() -> None:
    for share in (0.05, 0.2):
        cost = serve_backlog(RouterSettings(batch_share=share), 600)
        got = cost["batch"] / (cost["batch"] + cost["interactive"])
        assert abs(got - share) < 0.01
    assert serve_backlog(RouterSettings(batch_share=0.0), 100)["batch"] == 0.0


def test_a_request_that_would_miss_its_slo_goes_before_its_turn() -> None:
    slow = RouterSettings(tenants={"s": TenantSettings(ttft_slo_s=1.0)}, first_expected_output_tokens=1)
    d = Driver(slow)
    d.tell(beat("w", Role.BOTH, slots=1, pages_total=0), queued(1, "s", 500, 1))
    d.tell(accepted("w", 1, Stage.WHOLE), queued(2, "s", 400, 1), *(queued(seq, "o", 100, 1) for seq in range(3, 20)))
    assert seqs(d.tell(finished("w", 1, Stage.WHOLE))) == [3]
    d.now_s += 0.6
    assert seqs(d.tell(finished("w", 3, Stage.WHOLE))) == [2]


def test_an_slo_lead_is_bounded_and_repaid() -> None:
    """The tenant with the SLO is always overdue: its lead must stay below the bound and what it takes at once."""
    lead = 1000.0
    settings = RouterSettings(
        tenants={"s": TenantSettings(ttft_slo_s=0.1)}, first_expected_output_tokens=1, slo_lead_tokens=lead
    )
    d = Driver(settings)
    d.tell(beat("w", Role.BOTH, slots=2, pages_total=0))
    rng, size, served = random.Random(3), {}, {"s": 0.0, "o": 0.0}
    for seq in range(1, 2001):
        size[seq] = rng.choice((20, 100, 300))
        d.core.handle(queued(seq, "so"[seq % 2], size[seq], 1), d.now_s)
    running = seqs(d.tell())
    worst = 0.0
    for _ in range(700):
        d.now_s += 0.2
        number = running.pop(0)
        served["so"[number % 2]] += size[number] + 2
        running += seqs(d.core.handle(finished("w", number, Stage.WHOLE), d.now_s) + d.core.dispatch(d.now_s))
        worst = max(worst, served["s"] - served["o"])
        assert abs(served["s"] - served["o"]) <= lead + 2 * 302 + 2 * 302
    assert worst > 500, "it never led"


def test_nothing_is_granted_beyond_the_budget_of_kv_memory_over_all_workers() -> None:
    d = Driver(RouterSettings(max_kv_hbm_bytes=8000))
    d.tell(beat("w1", Role.BOTH, slots=10), beat("w2", Role.BOTH, slots=10))
    assert len(seqs(d.tell(*(queued(seq, prompt_tokens=20, max_tokens=12) for seq in range(1, 9))))) == 4
    assert seqs(d.tell(finished(d.core.ledger.entries[1].worker.member, 1, Stage.WHOLE))) == [5]  # type: ignore[union-attr]


def test_a_request_larger_than_the_whole_budget_of_kv_memory_is_rejected() -> None:
    d = Driver(RouterSettings(max_kv_hbm_bytes=8000))
    d.tell(beat("w", Role.BOTH))
    rejected = notices(d.tell(queued(1, prompt_tokens=200)))
    assert [notice.code for notice in rejected if isinstance(notice, Rejected)] == ["unservable"]


def moved(worker: str, seq: int, pages: int) -> HandedOff:
    return HandedOff(
        worker=worker, seq=seq, request_id=f"q{seq}", attempt=0, tokens=[1], pages=pages, page_bytes=1000,
        lease_s=30.0, params=b"",
    )  # fmt: skip


def test_handoffs_wait_for_the_budget_of_kv_transfers_and_the_router_knows_until_when() -> None:
    d = Driver(RouterSettings(max_kv_io_bytes_per_s=10_000.0))
    d.tell(beat("p", Role.PREFILL), beat("d", Role.DECODE))
    d.tell(*(queued(seq) for seq in (1, 2, 3)))
    d.tell(*(accepted("p", seq, Stage.PREFILL) for seq in (1, 2, 3)))
    assert seqs(d.tell(moved("p", 1, 8), moved("p", 2, 8))) == [1]
    assert d.core.wake_s is not None
    assert abs(d.core.wake_s - d.now_s - 0.6) < 1e-9
    d.now_s = d.core.wake_s
    assert seqs(d.tell()) == [2]
    assert d.core.wake_s is None


def test_a_bucket_lets_no_more_than_its_rate_and_a_burst_through() -> None:
    rng = random.Random(4)
    bucket, now_s, passed, largest = Bucket(100.0, 2.0), 0.0, 0.0, 0.0
    for _ in range(5000):
        now_s += rng.expovariate(5.0)
        amount = rng.choice((1.0, 30.0, 500.0))
        if bucket.has(amount, now_s):
            bucket.take(amount, now_s)
            passed += amount
            largest = max(largest, amount)
        bucket.check()
        assert passed <= 100.0 * (now_s + 2.0) + largest
    assert passed >= 100.0 * now_s * 0.8


def test_a_tenant_is_charged_for_the_pages_that_its_handoffs_were_seen_to_move() -> None:
    d = Driver(RouterSettings(kv_tokens_per_gb=2.0**30))
    d.tell(beat("p", Role.PREFILL), beat("d", Role.DECODE), queued(1, "a", 10, 5), accepted("p", 1, Stage.PREFILL))
    d.tell(moved("p", 1, 8))
    entry = d.core.ledger.entries[1]
    first, decode = entry.charges
    expected = 10 + 2 * 5 + 8 * 1000
    assert (first.cost, decode.cost) == (10 + 2 * 5, expected)
    tags = [charge.queue._flows["a"].tag for charge in entry.charges]
    ended = Finished(worker="d", seq=1, request_id="q1", attempt=0, stage=Stage.DECODE, reason=Reason.STOP,
                     output_tokens=5, moved_bytes=3000)  # fmt: skip
    d.tell(ended)
    settled = [charge.queue._flows["a"].tag for charge in (first, decode)]
    assert settled == [tags[0] + 3000, tags[1] - 5000]


def test_outputs_are_learned_by_tenant_and_capped_by_max_tokens() -> None:
    d = Driver()
    d.tell(beat("w", Role.BOTH, slots=8), *(queued(seq, "a", 10, 1000) for seq in (1, 2)), queued(3, "b", 10, 1000))
    costs = d.core.ledger.costs
    assert costs.estimate(d.core.ledger.entries[3]) == 10 + 2 * 256
    ended = Finished(worker="w", seq=1, request_id="q1", attempt=0, stage=Stage.WHOLE, reason=Reason.STOP,
                     output_tokens=40)  # fmt: skip
    d.tell(ended)
    assert costs.estimate(d.core.ledger.entries[2]) == 10 + 2 * 40
    assert costs.estimate(d.core.ledger.entries[3]) == 10 + 2 * 256
    d.tell(queued(4, "a", 10, 5))
    assert costs.estimate(d.core.ledger.entries[4]) == 10 + 2 * 5
