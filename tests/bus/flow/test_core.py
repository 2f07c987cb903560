from __future__ import annotations

import random

from llmserve.bus.flow.actions import Action, Broadcast, CheckStored, Discard, NotifyGateway, SendGrant
from llmserve.bus.flow.core import RouterCore
from llmserve.bus.flow.events import Absent, Checked, Event, NoResponders, Reconnected, Tick
from llmserve.bus.flow.settings import RouterSettings, TenantSettings
from llmserve.bus.messages import (
    Accepted,
    AttemptLost,
    Cancel,
    Failed,
    Finished,
    HandedOff,
    Heartbeat,
    Reason,
    Refused,
    Rejected,
    Role,
    Running,
    Stage,
    Sync,
)
from tests.bus.flow.world import beat, request, stored


class Driver:
    """A core with a clock and the actions of each step."""

    def __init__(self, settings: RouterSettings | None = None) -> None:
        self.core = RouterCore(settings or RouterSettings(), random.Random(1))
        self.core.begin("r0", 1)
        self.now_s = 100.0

    def tell(self, *events: Event) -> list[Action]:
        actions: list[Action] = []
        for event in events:
            actions += self.core.handle(event, self.now_s)
            self.core.check()
        actions += self.core.dispatch(self.now_s)
        self.core.check()
        return actions

    def later(self, seconds: float, *alive: Heartbeat) -> list[Action]:
        self.now_s += seconds
        gateway = Heartbeat(member="g0", role=Role.GATEWAY, host="h", pid=1)
        return self.tell(gateway, *alive, Tick())


def grants(actions: list[Action]) -> list[tuple[str, int, Stage]]:
    return [(a.worker, a.grant.seq, a.grant.stage) for a in actions if isinstance(a, SendGrant)]


def notices(actions: list[Action]) -> list[AttemptLost | Rejected]:
    return [a.message for a in actions if isinstance(a, NotifyGateway)]


def accepted(worker: str, seq: int, stage: Stage, attempt: int = 0) -> Accepted:
    return Accepted(worker=worker, seq=seq, attempt=attempt, stage=stage, epoch=1)


def finished(worker: str, seq: int, stage: Stage, output_tokens: int = 1) -> Finished:
    return Finished(
        worker=worker, seq=seq, request_id="", attempt=0, stage=stage, reason=Reason.STOP, output_tokens=output_tokens
    )


def handed_off(worker: str, seq: int, lease_s: float = 30.0) -> HandedOff:
    return HandedOff(
        worker=worker, seq=seq, request_id=f"q{seq}", attempt=0, tokens=[1], pages=1, page_bytes=1,
        lease_s=lease_s, params=b"",
    )  # fmt: skip


def queued(seq: int, tenant: str = "a", prompt_tokens: int = 10, max_tokens: int = 10) -> Event:
    return stored(seq, tenant, request(f"q{seq}", 0, prompt_tokens, max_tokens))


def test_a_request_is_prefilled_then_decoded_by_a_worker_of_the_same_fingerprint() -> None:
    d = Driver()
    d.tell(beat("p", Role.PREFILL), beat("other", Role.DECODE, fingerprint="f2"), beat("d", Role.DECODE))
    assert grants(d.tell(queued(1))) == [("p", 1, Stage.PREFILL)]
    assert grants(d.tell(accepted("p", 1, Stage.PREFILL))) == []
    assert grants(d.tell(handed_off("p", 1))) == [("d", 1, Stage.DECODE)]
    d.tell(accepted("d", 1, Stage.DECODE), finished("d", 1, Stage.DECODE))
    assert d.core.ledger.entries == {}


def test_prefill_waits_while_no_decode_worker_could_take_the_handoff() -> None:
    d = Driver()
    d.tell(beat("p", Role.PREFILL))
    assert grants(d.tell(queued(1))) == []
    assert grants(d.tell(beat("d", Role.DECODE))) == [("p", 1, Stage.PREFILL)]


def test_a_refused_grant_goes_elsewhere_and_the_refusing_worker_rests_until_its_next_heartbeat() -> None:
    d = Driver()
    d.tell(beat("w1", Role.BOTH))
    assert grants(d.tell(queued(1))) == [("w1", 1, Stage.WHOLE)]
    refusal = Refused(worker="w1", seq=1, attempt=0, stage=Stage.WHOLE, reason="busy")
    assert grants(d.tell(refusal)) == []
    assert grants(d.tell(beat("w2", Role.BOTH))) == [("w2", 1, Stage.WHOLE)]


def test_a_refusal_for_good_rejects_the_request() -> None:
    d = Driver()
    d.tell(beat("w1", Role.BOTH), queued(1))
    refusal = Refused(worker="w1", seq=1, attempt=0, stage=Stage.WHOLE, reason="wrong api", retry=False)
    actions = d.tell(refusal)
    assert [notice.code for notice in notices(actions) if isinstance(notice, Rejected)] == ["unservable"]
    assert Discard(1) in actions


def test_an_unconfirmed_grant_is_lost_after_three_seconds() -> None:
    d = Driver()
    d.tell(beat("w", Role.BOTH), queued(1))
    assert notices(d.later(2.9, beat("w", Role.BOTH, running=[]))) == []
    lost = notices(d.later(0.2))
    assert [(notice.request_id, notice.attempt) for notice in lost] == [("q1", 0)]


def test_no_responders_requeue_the_grant_and_lose_what_the_worker_ran() -> None:
    d = Driver()
    d.tell(beat("w1", Role.BOTH), queued(1), accepted("w1", 1, Stage.WHOLE))
    assert grants(d.tell(accepted("w1", 1, Stage.WHOLE), queued(2))) == [("w1", 2, Stage.WHOLE)]
    assert notices(d.tell(NoResponders("w1", 2))) == []
    d.now_s += 0.25
    assert [notice.request_id for notice in notices(d.tell(Absent("w1")))] == ["q1"]
    assert grants(d.tell(beat("w2", Role.BOTH))) == [("w2", 2, Stage.WHOLE)]


def test_right_after_a_reconnect_no_responders_do_not_condemn_the_worker() -> None:
    d = Driver()
    d.tell(beat("w1", Role.BOTH), queued(1))
    d.tell(accepted("w1", 1, Stage.WHOLE), Reconnected(), queued(2))
    assert notices(d.tell(NoResponders("w1", 2))) == []
    running = [Running(seq=1, attempt=0, stage=Stage.WHOLE)]
    assert grants(d.tell(beat("w1", Role.BOTH, running=running))) == [("w1", 2, Stage.WHOLE)]


def test_a_silent_worker_loses_its_requests_and_the_handoffs_that_it_holds() -> None:
    d = Driver()
    d.tell(beat("p", Role.PREFILL), beat("d", Role.DECODE, slots=1), queued(1), accepted("p", 1, Stage.PREFILL))
    d.tell(accepted("p", 1, Stage.PREFILL), handed_off("p", 1), accepted("d", 1, Stage.DECODE))
    d.tell(queued(2), accepted("p", 2, Stage.PREFILL), handed_off("p", 2))
    d.tell(queued(3), accepted("p", 3, Stage.PREFILL))
    decoding = [Running(seq=1, attempt=0, stage=Stage.DECODE)]
    lost = notices(d.later(3.1, beat("d", Role.DECODE, slots=1, running=decoding)))
    assert sorted(notice.request_id for notice in lost) == ["q2", "q3"]


def test_a_handoff_without_a_free_decode_worker_is_lost_before_its_lease_ends() -> None:
    d = Driver()
    d.tell(beat("p", Role.PREFILL), beat("d", Role.DECODE, slots=1))
    for seq in (1, 2):
        d.tell(queued(seq), accepted("p", seq, Stage.PREFILL))
        d.tell(accepted("p", seq, Stage.PREFILL), handed_off("p", seq, lease_s=10.0))
    d.tell(accepted("d", 1, Stage.DECODE))
    held = [Running(seq=2, attempt=0, stage=Stage.PREFILL, held=True)]
    decoding = [Running(seq=1, attempt=0, stage=Stage.DECODE)]
    lost = []
    for _ in range(9):
        alive = beat("p", Role.PREFILL, running=held), beat("d", Role.DECODE, slots=1, running=decoding)
        lost += [(d.now_s, notice) for notice in notices(d.later(0.9, *alive))]
    assert [(notice.request_id, 107.5 < when_s < 109) for when_s, notice in lost[:1]] == [("q2", True)]
    notice = lost[0][1]
    assert isinstance(notice, AttemptLost)
    assert notice.blameless


def test_an_attempt_that_fails_on_its_worker_counts_as_a_try() -> None:
    d = Driver()
    d.tell(beat("w", Role.BOTH), queued(1), accepted("w", 1, Stage.WHOLE))
    failed = Failed(worker="w", seq=1, request_id="q1", attempt=0, stage=Stage.WHOLE, error="boom")
    (notice,) = notices(d.tell(failed))
    assert isinstance(notice, AttemptLost)
    assert not notice.blameless


def test_a_request_missing_in_its_workers_inventory_is_looked_up_and_lost_if_it_is_still_stored() -> None:
    d = Driver()
    d.tell(beat("w", Role.BOTH), queued(1))
    d.tell(accepted("w", 1, Stage.WHOLE))
    assert CheckStored(1) not in d.later(0.5, beat("w", Role.BOTH))
    assert CheckStored(1) in d.later(0.2, beat("w", Role.BOTH))
    assert [notice.request_id for notice in notices(d.tell(Checked(1, True)))] == ["q1"]


def test_a_request_missing_in_its_workers_inventory_and_on_the_stream_has_finished() -> None:
    d = Driver()
    d.tell(beat("w", Role.BOTH), queued(1))
    d.tell(accepted("w", 1, Stage.WHOLE))
    d.later(0.7, beat("w", Role.BOTH))
    assert notices(d.tell(Checked(1, False))) == []
    assert d.core.ledger.entries == {}


def test_a_new_leader_adopts_what_runs_whichever_it_hears_of_first() -> None:
    running = beat("w", Role.BOTH, running=[Running(seq=1, attempt=0, stage=Stage.WHOLE)])
    for history in ([running, queued(1)], [queued(1), running]):
        d = Driver()
        for event in history:
            d.core.handle(event, d.now_s)
        assert grants(d.tell()) == []
        assert d.core.ledger.entries[1].worker is not None


def test_a_new_leader_grants_a_handoff_that_is_published_again_before_its_request_is_read() -> None:
    d = Driver()
    held = [Running(seq=1, attempt=0, stage=Stage.PREFILL, held=True)]
    d.tell(handed_off("p", 1), beat("p", Role.PREFILL, running=held), beat("d", Role.DECODE))
    assert grants(d.tell(queued(1))) == [("d", 1, Stage.DECODE)]


def test_a_handoff_that_got_lost_on_the_way_is_asked_for_again() -> None:
    d = Driver()
    held = beat("p", Role.PREFILL, running=[Running(seq=1, attempt=0, stage=Stage.PREFILL, held=True)])
    d.tell(beat("p", Role.PREFILL), beat("d", Role.DECODE), queued(1))
    d.tell(accepted("p", 1, Stage.PREFILL))
    assert Broadcast(Sync(epoch=1, router="r0")) in d.later(0.7, held)


def test_a_higher_attempt_supersedes_the_lower_and_goes_first() -> None:
    d = Driver()
    d.tell(beat("w", Role.BOTH, slots=1), queued(1))
    d.tell(accepted("w", 1, Stage.WHOLE), queued(2), queued(3))
    d.tell(beat("w", Role.BOTH, leaving=True))
    assert Discard(1) in d.tell(stored(4, "a", request("q1", attempt=1)))
    assert grants(d.tell(beat("w2", Role.BOTH, slots=1))) == [("w2", 4, Stage.WHOLE)]


def test_a_cancelled_request_frees_its_credit_only_when_its_worker_says_so() -> None:
    d = Driver()
    d.tell(beat("w", Role.BOTH, slots=1), queued(1))
    d.tell(accepted("w", 1, Stage.WHOLE), queued(2))
    assert grants(d.tell(Cancel(request_ids=["q1"]))) == []
    ended = Finished(worker="w", seq=1, request_id="q1", attempt=0, stage=Stage.WHOLE, reason=Reason.CANCELLED)
    assert grants(d.tell(ended)) == [("w", 2, Stage.WHOLE)]


def test_a_cancelled_request_that_arrives_after_its_cancel_is_discarded() -> None:
    d = Driver()
    d.tell(beat("w", Role.BOTH), Cancel(request_ids=["q1"]))
    assert d.tell(queued(1)) == [Discard(1)]


def test_the_requests_of_a_silent_gateway_are_cancelled_and_discarded() -> None:
    d = Driver()
    d.tell(queued(1))
    d.now_s += 3.1
    actions = d.tell(Tick())
    assert Broadcast(Cancel(request_ids=["q1"], epoch=1)) in actions
    assert Discard(1) in actions
    assert d.core.ledger.entries == {}


def test_a_lost_attempt_is_told_again_until_its_gateway_acts() -> None:
    d = Driver()
    d.tell(beat("w", Role.BOTH), queued(1))
    d.tell(accepted("w", 1, Stage.WHOLE), beat("w", Role.BOTH, leaving=True))
    assert CheckStored(1) in d.later(2.1)
    assert [notice.request_id for notice in notices(d.tell(Checked(1, True)))] == ["q1"]


def test_a_prompt_longer_than_every_models_context_is_rejected() -> None:
    d = Driver()
    d.tell(beat("w", Role.BOTH, max_model_len=1000))
    rejected = notices(d.tell(queued(1, prompt_tokens=1000)))
    assert [notice.code for notice in rejected if isinstance(notice, Rejected)] == ["unservable"]
    assert d.core.ledger.entries == {}


def test_a_request_larger_than_the_whole_token_budget_is_rejected() -> None:
    d = Driver(RouterSettings(max_tokens_in_flight=100))
    d.tell(beat("w", Role.BOTH))
    rejected = notices(d.tell(queued(1, prompt_tokens=90, max_tokens=20)))
    assert [notice.code for notice in rejected if isinstance(notice, Rejected)] == ["unservable"]


def test_a_request_for_an_engine_that_no_worker_runs_is_rejected_after_a_grace() -> None:
    d = Driver()
    d.tell(beat("w", Role.BOTH), stored(1, "a", request("q1", api="a2")))
    assert notices(d.later(1.0, beat("w", Role.BOTH))) == []
    rejected = notices(d.later(2.0, beat("w", Role.BOTH))) + notices(d.later(1.5, beat("w", Role.BOTH)))
    assert [notice.code for notice in rejected if isinstance(notice, Rejected)] == ["unservable"]


def test_without_any_worker_a_request_waits_until_its_deadline() -> None:
    d = Driver(RouterSettings(queue_deadline_s=60))
    d.tell(queued(1))
    for _ in range(29):
        assert notices(d.later(2.0)) == []
    rejected = notices(d.later(2.1))
    assert [notice.code for notice in rejected if isinstance(notice, Rejected)] == ["deadline"]


def test_a_resubmitted_request_waits_while_all_roles_are_alive_and_busy() -> None:
    d = Driver(RouterSettings(max_tokens_in_flight=30))
    d.tell(beat("w", Role.BOTH), queued(1))
    d.tell(accepted("w", 1, Stage.WHOLE), stored(2, "a", request("q2", attempt=1)))
    running = beat("w", Role.BOTH, running=[Running(1, 0, Stage.WHOLE)])
    assert [notices(d.later(2.0, running)) for _ in range(10)] == [[]] * 10


def test_a_large_prompt_may_have_an_idle_prefill_worker_for_itself() -> None:
    d = Driver()
    d.tell(beat("p", Role.PREFILL, prefill_tokens=200), beat("d", Role.DECODE), queued(1, prompt_tokens=900))
    assert d.core.ledger.entries[1].worker is not None
    assert grants(d.tell(queued(2, prompt_tokens=10))) == []


def test_a_large_request_is_overtaken_for_a_while_and_then_never_starved() -> None:
    d = Driver(RouterSettings(max_tokens_in_flight=400, bypass_s=1.0))
    d.tell(beat("w", Role.BOTH, slots=50))
    seq = 0

    def small() -> list[tuple[str, int, Stage]]:
        nonlocal seq
        seq += 1
        return grants(d.tell(queued(seq, "small", prompt_tokens=90, max_tokens=10)))

    running = [number for _ in range(4) for _, number, _ in small()]
    large = 1000
    d.tell(queued(large, "large", prompt_tokens=350, max_tokens=10))
    overtaken, waited_s = 0, 0.0
    while d.core.ledger.entries[large].worker is None:
        assert waited_s < 3.0, "the large request starves"
        d.now_s += 0.1
        waited_s += 0.1
        d.tell(Heartbeat(member="g0", role=Role.GATEWAY, host="h", pid=1))
        if running:
            first = running.pop(0)
            running += [n for _, n, _ in grants(d.tell(accepted("w", first, Stage.WHOLE)))]
            running += [n for _, n, _ in grants(d.tell(finished("w", first, Stage.WHOLE))) if n != large]
        more = [n for _, n, _ in small() if n != large]
        overtaken += len(more)
        running += more
    assert overtaken > 0


def test_a_tenant_at_its_own_bound_blocks_nobody_else() -> None:
    d = Driver(RouterSettings(tenants={"a": TenantSettings(max_concurrency=1)}))
    d.tell(beat("w", Role.BOTH, slots=10))
    sent = grants(d.tell(queued(1), queued(2), queued(3, "b")))
    assert [seq for _, seq, _ in sent] == [1, 3]
    assert [seq for _, seq, _ in grants(d.tell(finished("w", 1, Stage.WHOLE)))] == [2]


def test_backlogged_tenants_get_service_in_proportion_to_their_weights() -> None:
    weights = {"a": 1.0, "b": 1.0, "c": 2.0, "d": 4.0}
    rng = random.Random(5)
    d = Driver(RouterSettings(tenants={name: TenantSettings(weight=weight) for name, weight in weights.items()}))
    d.tell(beat("w", Role.BOTH, slots=8, pages_total=0))
    sizes, seq, largest = {}, 0, 0
    for tenant in weights:
        for _ in range(800):
            seq += 1
            prompt, output = rng.choice(((10, 5), (100, 50), (400, 10)))
            sizes[seq] = (tenant, prompt, output)
            largest = max(largest, prompt + 2 * output)
            d.core.handle(queued(seq, tenant, prompt_tokens=prompt, max_tokens=256), d.now_s)
    running = [number for _, number, _ in grants(d.core.dispatch(d.now_s))]
    service = dict.fromkeys(weights, 0.0)
    for _ in range(1200):
        number = running.pop(rng.randrange(len(running)))
        tenant, prompt, output = sizes[number]
        service[tenant] += prompt + 2 * output
        d.core.handle(finished("w", number, Stage.WHOLE, output), d.now_s)
        running += [n for _, n, _ in grants(d.core.dispatch(d.now_s))]
    # Estimates charge up to the full max_tokens until outputs are known, and 8 requests are in flight.
    bound = (2 + 8) * (400 + 2 * 256)
    for one in weights:
        for other in weights:
            assert abs(service[one] / weights[one] - service[other] / weights[other]) <= bound
    total = sum(service.values())
    for tenant, weight in weights.items():
        assert abs(service[tenant] / total - weight / 8) < 0.02


def retried(seq: int, api: str = "a1") -> Event:
    return stored(seq, "a", request(f"q{seq}", 1, api=api))


def rejections(actions: list[Action]) -> list[tuple[str, str, str]]:
    return [(no.request_id, no.code, no.message) for no in notices(actions) if isinstance(no, Rejected)]


def test_a_later_attempt_is_rejected_once_no_prefill_worker_has_lived_for_its_patience() -> None:
    d = Driver(RouterSettings(retry_patience_s=8.0))
    d.tell(beat("d", Role.DECODE), queued(1), retried(2))
    d.later(0.0, beat("d", Role.DECODE))
    assert rejections(d.later(7.9, beat("d", Role.DECODE))) == []
    actions = d.later(0.2, beat("d", Role.DECODE))
    assert rejections(actions) == [("q2", "unavailable", "no live worker of role prefill or both for 8 s")]
    assert Discard(2) in actions


def test_a_later_attempt_is_rejected_once_no_decode_worker_has_lived_for_its_patience() -> None:
    d = Driver(RouterSettings(retry_patience_s=8.0))
    d.tell(beat("p", Role.PREFILL), beat("other", Role.DECODE, fingerprint="f2"), retried(1))
    alive = beat("p", Role.PREFILL), beat("other", Role.DECODE, fingerprint="f2")
    assert rejections(d.later(0.0, *alive) + d.later(7.9, *alive)) == []
    rejected = rejections(d.later(0.2, *alive))
    assert rejected == [("q1", "unavailable", "no live worker of role decode for 8 s")]


def test_a_first_attempt_waits_for_workers_beyond_the_patience_of_later_ones() -> None:
    d = Driver()
    d.tell(queued(1))
    assert rejections(d.later(0.0) + d.later(60.0)) == []
    assert grants(d.tell(beat("w", Role.BOTH))) == [("w", 1, Stage.WHOLE)]


def test_a_later_attempt_has_its_whole_patience_however_long_the_workers_are_gone_already() -> None:
    d = Driver(RouterSettings(retry_patience_s=8.0))
    d.tell(queued(1))
    d.later(0.0)
    d.later(60.0)
    d.tell(retried(2))
    assert rejections(d.later(7.9)) == []
    assert [name for name, _, _ in rejections(d.later(0.2))] == ["q2"]


def test_a_worker_that_comes_back_renews_the_patience_and_a_draining_one_does_not() -> None:
    d = Driver(RouterSettings(retry_patience_s=8.0))
    draining = beat("w", Role.BOTH, draining=True)
    d.tell(draining, retried(1))
    d.later(0.0, draining)
    d.later(5.0, beat("w", Role.BOTH, slots=0))
    d.later(1.0, draining)
    assert rejections(d.later(7.9, draining)) == []
    assert [name for name, _, _ in rejections(d.later(0.2, draining))] == ["q1"]


def test_a_handoff_whose_decode_workers_died_is_lost_by_its_lease_and_its_next_attempt_by_its_patience() -> None:
    d = Driver(RouterSettings(retry_patience_s=8.0))
    d.tell(beat("p", Role.PREFILL), beat("d", Role.DECODE), queued(1), accepted("p", 1, Stage.PREFILL))
    d.tell(beat("d", Role.DECODE, leaving=True), handed_off("p", 1, lease_s=2.0))
    held = beat("p", Role.PREFILL, running=[Running(seq=1, attempt=0, stage=Stage.PREFILL, held=True)])
    assert [type(notice) for notice in notices(d.later(1.1, held))] == [AttemptLost]
    d.tell(stored(2, "a", request("q1", 1)))
    free = beat("p", Role.PREFILL)
    assert rejections(d.later(0.0, free) + d.later(7.9, free)) == []
    assert [code for _, code, _ in rejections(d.later(0.2, free))] == ["unavailable"]


def test_a_handoff_whose_decode_workers_died_ends_by_the_patience_and_does_not_wait_for_its_lease() -> None:
    d = Driver(RouterSettings(retry_patience_s=5.0))
    d.tell(beat("p", Role.PREFILL), beat("d", Role.DECODE), queued(1), accepted("p", 1, Stage.PREFILL))
    d.tell(beat("d", Role.DECODE, leaving=True), handed_off("p", 1))
    held = beat("p", Role.PREFILL, running=[Running(seq=1, attempt=0, stage=Stage.PREFILL, held=True)])
    assert rejections(d.later(0.0, held) + d.later(4.9, held)) == []
    assert rejections(d.later(0.2, held)) == [("q1", "unavailable", "no live worker of role decode for 5 s")]
    assert d.core.ledger.entries == {}


def test_a_handoff_that_nobody_can_read_is_lost_by_the_patience_if_another_attempt_could_be_served() -> None:
    d = Driver(RouterSettings(retry_patience_s=5.0))
    d.tell(beat("p", Role.PREFILL), beat("d", Role.DECODE), queued(1), accepted("p", 1, Stage.PREFILL))
    d.tell(beat("d", Role.DECODE, leaving=True), handed_off("p", 1))
    held = beat("p", Role.PREFILL, running=[Running(seq=1, attempt=0, stage=Stage.PREFILL, held=True)])
    alive = held, beat("both", Role.BOTH), beat("other", Role.DECODE, fingerprint="f2")
    assert notices(d.later(0.0, *alive) + d.later(4.9, *alive)) == []
    assert [type(notice) for notice in notices(d.later(0.2, *alive))] == [AttemptLost]
    assert grants(d.tell(stored(2, "a", request("q1", 1)))) == [("both", 2, Stage.WHOLE)]


def test_a_decode_worker_in_time_gets_the_handoff_that_waits() -> None:
    d = Driver(RouterSettings(retry_patience_s=5.0))
    d.tell(beat("p", Role.PREFILL), beat("d", Role.DECODE), queued(1), accepted("p", 1, Stage.PREFILL))
    d.tell(beat("d", Role.DECODE, leaving=True), handed_off("p", 1))
    held = beat("p", Role.PREFILL, running=[Running(seq=1, attempt=0, stage=Stage.PREFILL, held=True)])
    d.later(0.0, held)
    d.later(4.0, held)
    assert grants(d.tell(beat("d2", Role.DECODE))) == [("d2", 1, Stage.DECODE)]
    runs = beat("d2", Role.DECODE, running=[Running(seq=1, attempt=0, stage=Stage.DECODE)])
    assert notices(d.tell(accepted("d2", 1, Stage.DECODE)) + d.later(3.0, held, runs)) == []


def test_a_rejection_is_repeated_until_its_gateway_withdraws_the_request() -> None:
    d = Driver(RouterSettings(max_tokens_in_flight=100, lost_retry_s=2.0))
    d.tell(beat("w", Role.BOTH))
    said = rejections(d.tell(queued(1, prompt_tokens=90, max_tokens=20)))
    assert rejections(d.later(1.9, beat("w", Role.BOTH))) == []
    assert rejections(d.later(0.2, beat("w", Role.BOTH))) == said
    d.tell(Cancel(request_ids=["q1"]))
    assert rejections(d.later(2.1, beat("w", Role.BOTH))) == []


def test_a_rejection_that_nobody_answers_is_not_repeated_for_ever() -> None:
    d = Driver(RouterSettings(max_tokens_in_flight=100, lost_retry_s=2.0))
    d.tell(beat("w", Role.BOTH), queued(1, prompt_tokens=90, max_tokens=20))
    assert sum(len(rejections(d.later(2.1, beat("w", Role.BOTH)))) for _ in range(10)) == 3
