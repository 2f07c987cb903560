"""Placement by what a worker would have to compute: hits, load against recomputation, tiers, bursts, charges."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from msgspec.structs import replace

from llmserve.bus.block_hashes import pack_short
from llmserve.bus.flow.actions import AskSnapshot
from llmserve.bus.flow.events import Event, MemberLost
from llmserve.bus.flow.settings import RouterSettings
from llmserve.bus.messages import Finished, Heartbeat, KvChange, KvEvents, Reason, Role, Stage, Tier
from tests.bus.flow.test_classes import moved
from tests.bus.flow.test_core import Driver, accepted, finished, grants
from tests.bus.flow.world import beat, request, stored

BLOCK = 16


def worker(name: str, role: Role = Role.PREFILL, **fields: Any) -> Heartbeat:
    defaults: dict[str, Any] = {
        "prefill_tokens": 4096, "slots": 64, "pages_total": 10_000, "pages_free": 10_000, "page_tokens": BLOCK,
        "max_model_len": 100_000,
    }  # fmt: skip
    return beat(name, role, **(defaults | fields))


def holds(
    member: str, hashes: range, tier: Tier = Tier.GPU, *, seq: int = 1, host: str = "", fingerprint: str = "f1"
) -> KvEvents:
    change = KvChange(tier, stored=pack_short(hashes))
    return KvEvents(member=member, seq=seq, fingerprint=fingerprint, block_tokens=BLOCK, changes=[change], host=host)


def asks(seq: int, hashes: range, tokens: int | None = None, tenant: str = "a") -> Event:
    """A request whose prompt consists of these blocks, and a last token."""
    prompt_tokens = len(hashes) * BLOCK + 1 if tokens is None else tokens
    made = request(f"q{seq}", 0, prompt_tokens, 10)
    return stored(seq, tenant, replace(made, block_tokens=BLOCK, block_hashes=pack_short(hashes)))


def pool(*names: str, **fields: Any) -> Driver:
    d = Driver(RouterSettings())
    d.tell(worker("d", Role.DECODE, slots=1000), *(worker(name, **fields) for name in names))
    return d


def fingerprint_of(d: Driver) -> str:
    return d.core.ledger.workers["p1"].beat.fingerprint


@pytest.mark.parametrize("role", [Role.PREFILL, Role.BOTH])
def test_a_prompt_goes_where_most_of_it_is(role: Role) -> None:
    d = Driver(RouterSettings())
    d.tell(worker("d", Role.DECODE, slots=1000), *(worker(name, role) for name in ("p1", "p2", "p3")))
    print_ = fingerprint_of(d)
    d.tell(holds("p2", range(60), fingerprint=print_), holds("p3", range(30), fingerprint=print_))
    for seq in range(1, 6):
        assert [name for name, _, _ in grants(d.tell(asks(seq, range(100 if seq % 2 else 60))))] == ["p2"]
        stage = Stage.PREFILL if role is Role.PREFILL else Stage.WHOLE
        d.tell(accepted("p2", seq, stage), finished("p2", seq, stage))
        d.now_s += 60.0


def test_a_hot_prefix_does_not_pile_up_on_the_worker_that_has_it() -> None:
    d = pool("p1", "p2", "p3", "p4")
    d.tell(holds("p1", range(50), fingerprint=fingerprint_of(d)))
    # 800 tokens of each are at p1, 400 are new everywhere.
    placed = Counter(name for seq in range(1, 17) for name, _, _ in grants(d.tell(asks(seq, range(50), tokens=1200))))
    assert placed["p1"] >= 4
    assert len(placed) == 4


def test_of_a_burst_with_one_new_prefix_the_followers_go_where_the_first_is_computed() -> None:
    d = pool("p1", "p2", "p3", "p4")
    placed = [name for seq in range(1, 5) for name, _, _ in grants(d.tell(asks(seq, range(100))))]
    assert len(placed) == 4
    assert len(set(placed)) == 1
    entries = d.core.ledger.entries
    assert [entries[seq].cached_tokens for seq in range(1, 5)] == [0, 1600, 1600, 1600]


def test_without_reuse_the_least_loaded_worker_is_taken() -> None:
    d = pool("p1", "p2", "p3")
    placed = Counter(
        name for seq in range(1, 10) for name, _, _ in grants(d.tell(asks(seq, range(seq * 100, seq * 100 + 60))))
    )
    assert placed == {"p1": 3, "p2": 3, "p3": 3}


@pytest.mark.parametrize(
    ("loads", "expected"),
    [({}, "p1"), ({"s3": 50_000.0}, "p1"), ({"s3": 900.0}, None)],
)
def test_a_tier_counts_by_its_measured_load_time_against_recomputation(
    loads: dict[str, float], expected: str | None
) -> None:
    d = Driver(RouterSettings())
    rates: dict[str, Any] = {"prefill_tokens_s": 1000.0, "load_tokens_s": loads}
    d.tell(worker("d", Role.DECODE, slots=1000), worker("p1", host="h1", **rates), worker("p2", host="h2", **rates))
    d.tell(holds("kv", range(60), Tier.S3, host="h1", fingerprint=fingerprint_of(d)))
    placed = set()
    for seq in range(1, 9):
        placed |= {name for name, _, _ in grants(d.tell(asks(seq, range(60))))}
        for name in ("p1", "p2"):
            d.tell(finished(name, seq, Stage.PREFILL))
    assert placed == ({expected} if expected else {"p1", "p2"})


def test_what_is_reused_takes_no_credit_and_is_not_charged() -> None:
    d = pool("p1", prefill_tokens=2000)
    d.tell(holds("p1", range(100), fingerprint=fingerprint_of(d)))
    sent = grants(d.tell(*(asks(seq, range(100), tokens=1700) for seq in range(1, 6))))
    assert len(sent) == 5
    assert d.core.ledger.workers["p1"].outstanding_tokens == 5 * 100
    entry = d.core.ledger.entries[1]
    assert (entry.cached_tokens, entry.work_tokens) == (1600, 100)
    assert [charge.cost for charge in entry.charges] == [100 + 2 * 10]


def test_a_request_waits_at_its_prefix_rather_than_be_computed_elsewhere_as_long_as_that_is_sooner() -> None:
    d = pool("p1", "p2", prefill_tokens=1000)
    d.tell(holds("p1", range(100), fingerprint=fingerprint_of(d)))
    assert [name for name, _, _ in grants(d.tell(asks(1, range(100), tokens=2500)))] == ["p1"]
    # 900 are outstanding at p1; the second has 200 to compute there, 1800 at p2.
    assert [name for name, _, _ in grants(d.tell(asks(2, range(100), tokens=1800)))] == ["p1"]
    assert d.core.ledger.workers["p1"].outstanding_tokens == 1100
    assert [name for name, _, _ in grants(d.tell(asks(3, range(100), tokens=1800)))] == ["p2"]


def test_a_prompt_that_is_wholly_cached_still_computes_its_last_block() -> None:
    d = pool("p1")
    d.tell(holds("p1", range(10), fingerprint=fingerprint_of(d)), asks(1, range(10), tokens=160))
    assert d.core.ledger.entries[1].cached_tokens == 144


def test_the_tenant_is_charged_what_was_computed_in_the_end() -> None:
    d = pool("p1")
    d.tell(holds("p1", range(100), fingerprint=fingerprint_of(d)), asks(1, range(100), tokens=1700))
    (charge,) = d.core.ledger.entries[1].charges
    assert charge.cost == 100 + 2 * 10
    end = Finished(
        worker="p1", seq=1, request_id="q1", attempt=0, stage=Stage.PREFILL, reason=Reason.STOP, output_tokens=1,
        cached_tokens=0,
    )  # fmt: skip
    actual = d.core.ledger.costs.actual(d.core.ledger.entries[1], 1, 0, 0)
    d.tell(end)
    assert actual == 1700 + 2


def test_pages_of_another_block_size_are_of_no_use() -> None:
    d = pool("p1", "p2", page_tokens=32)
    d.tell(holds("p1", range(100), fingerprint=fingerprint_of(d)), asks(1, range(100)))
    assert d.core.ledger.entries[1].cached_tokens == 0


def asked(actions: list[object]) -> list[str]:
    return [action.member for action in actions if isinstance(action, AskSnapshot)]


def test_a_member_is_asked_for_everything_when_a_message_is_missing_and_not_all_the_time() -> None:
    d = pool("p1")
    print_ = fingerprint_of(d)
    assert asked(list(d.tell(holds("p1", range(3), seq=1, fingerprint=print_)))) == []
    assert asked(list(d.tell(holds("p1", range(3, 5), seq=3, fingerprint=print_)))) == ["p1"]
    assert asked(list(d.tell(holds("p1", range(5, 6), seq=4, fingerprint=print_)))) == []
    assert asked(list(d.later(1.1, worker("p1", kv_seq=4)))) == ["p1"]
    d.tell(replace(holds("p1", range(9), seq=5, fingerprint=print_), snapshot=True))
    assert asked(list(d.later(1.1, worker("p1", kv_seq=5)))) == []
    assert len(d.core.locality.index) == 9
    assert d.core.locality.stats.lost == 1


def test_a_new_leader_asks_everyone_whose_heartbeat_shows_what_it_has_not_heard() -> None:
    d = Driver(RouterSettings())
    assert asked(list(d.tell(worker("p1", kv_seq=7), worker("p2")))) == ["p1"]
    assert d.core.locality.stats.lost == 0


@pytest.mark.parametrize("end", ["leaves", "lost", "silent"])
def test_entries_expire_with_their_member(end: str) -> None:
    d = pool("p1")
    print_ = fingerprint_of(d)
    d.tell(holds("p1", range(3), fingerprint=print_), holds("kv", range(4), Tier.NVME, fingerprint=print_))
    assert len(d.core.locality.index) == 4
    kv = Heartbeat(member="kv", role=Role.KV, host="h", pid=1, kv_seq=1)
    if end == "leaves":
        d.tell(replace(worker("p1"), leaving=True), kv)
    elif end == "lost":
        d.tell(MemberLost("p1"), kv)
    else:
        d.later(3.5, kv)
    assert len(d.core.locality.index.sources("p1")) == 0
    assert len(d.core.locality.index) == 4
    d.later(3.5)
    assert len(d.core.locality.index) == 0


def test_what_a_worker_loads_of_a_prefix_draws_on_the_budget_of_kv_transfers_and_handoffs_wait_for_it() -> None:
    d = Driver(RouterSettings(max_kv_io_bytes_per_s=10_000.0))
    d.tell(worker("d", Role.DECODE), worker("p1", host="h1", page_bytes=500))
    print_ = fingerprint_of(d)
    d.tell(
        holds("p1", range(10), fingerprint=print_), holds("kv", range(26), Tier.NVME, host="h1", fingerprint=print_)
    )
    d.tell(asks(1, range(26)), accepted("p1", 1, Stage.PREFILL))
    assert d.core.ledger.entries[1].loaded_bytes == 16 * 500
    assert grants(d.tell(moved("p1", 1, 8))) == []
    assert d.core.wake_s == pytest.approx(d.now_s + 0.6)
    d.now_s += 0.6
    assert [name for name, _, _ in grants(d.tell())] == ["d"]
