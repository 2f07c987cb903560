"""What a decode worker makes of pages that are on offer before their prompt is computed."""

from __future__ import annotations

from llmserve.bus.base import StoredRequest
from llmserve.bus.messages import Cancel, Finished, Grant, HandedOff, Prefilling, Reason, Role, Stage, encode
from llmserve.workers.actions import Abort, Action, Fetch, FetchAhead, Submit, Tell
from llmserve.workers.engine.base import EngineOutput, Offer, Step, Transfer
from llmserve.workers.reports import Identity
from llmserve.workers.state import WorkerState
from tests.workers.test_state import INFO
from tests.workers.world import request

ASKED = request("q1")


def worker(role: Role) -> WorkerState:
    return WorkerState(Identity("w", role), INFO, lease_s=5.0)


def offer(params: bytes = b"pages", *, inline: bool = True) -> Grant:
    said = Prefilling(worker="p", seq=7, request_id="q1", attempt=0, params=params)
    return Grant(
        epoch=1, seq=7, tenant="t", klass="interactive", stage=Stage.DECODE, attempt=0,
        request=encode(ASKED) if inline else b"", handoff=encode(said), ahead=True,
    )  # fmt: skip


def granted() -> Grant:
    said = HandedOff(
        worker="p", seq=7, request_id="q1", attempt=0, tokens=[5], pages=1, page_bytes=1, lease_s=5.0, params=b"all"
    )
    return Grant(
        epoch=1, seq=7, tenant="t", klass="interactive", stage=Stage.DECODE, attempt=0, request=b"",
        handoff=encode(said),
    )  # fmt: skip


def fetched(actions: list[Action]) -> list[tuple[str, bytes, bool]]:
    return [(a.work.work_id, a.work.handoff, a.work.ahead) for a in actions if isinstance(a, FetchAhead)]


def test_pages_on_offer_are_fetched_and_nothing_is_confirmed() -> None:
    state = worker(Role.DECODE)
    actions = state.granted(offer(), 0.0)
    assert fetched(actions) == [("q1.0", b"pages", True)]
    assert len(actions) == 1
    assert state.idle
    assert state.tenant_of("q1.0", 0.0) == "t"


def test_a_large_request_is_read_once_for_all_offers_and_the_grant() -> None:
    state = worker(Role.DECODE)
    first = offer(inline=False)
    assert state.granted(first, 0.0) == [Fetch(first)]
    assert state.granted(offer(b"more", inline=False), 0.0) == []
    stored = StoredRequest(7, "t", "interactive", ASKED, encode(ASKED))
    assert fetched(state.fetched(first, stored, 0.1)) == [("q1.0", b"more", True)]
    (submit,) = state.granted(granted(), 0.2)
    assert isinstance(submit, Submit)
    assert (submit.work.handoff, submit.work.ahead) == (b"all", False)


def test_what_is_cancelled_is_not_fetched_any_more() -> None:
    state = worker(Role.DECODE)
    state.granted(offer(), 0.0)
    assert state.cancelled(Cancel(request_ids=["q1"]), 0.1) == [Abort(["q1.0"])]
    assert fetched(state.granted(offer(b"more"), 0.2)) == []


def test_only_decode_workers_fetch_ahead() -> None:
    assert worker(Role.PREFILL).granted(offer(), 0.0) == []


def test_a_prefill_worker_tells_of_pages_while_it_computes_the_rest() -> None:
    state = worker(Role.PREFILL)
    grant = Grant(
        epoch=1, seq=7, tenant="t", klass="interactive", stage=Stage.PREFILL, attempt=0, request=encode(ASKED)
    )
    (submit,) = state.granted(grant, 0.0)
    assert isinstance(submit, Submit)
    state.accepted(submit)
    step = Step(offers=[Offer("q1.0", b"pages"), Offer("unknown.0", b"")])
    (told,) = [action.event for action in state.stepped(step, 0.1) if isinstance(action, Tell)]
    assert told == Prefilling(worker="w", seq=7, request_id="q1", attempt=0, params=b"pages")
    state.cancelled(Cancel(request_ids=["q1"]), 0.2)
    assert not [action for action in state.stepped(step, 0.3) if isinstance(action, Tell)]


def test_the_router_hears_how_many_bytes_moved_for_a_request_ahead_of_its_grant_and_after_it() -> None:
    state = worker(Role.DECODE)
    state.granted(offer(), 0.0)
    state.stepped(Step(transfers=[Transfer("nixl", "pull", 600, 0.1, "", "q1.0")]), 0.1)
    state.granted(offer(b"more"), 0.2)
    (submit,) = state.granted(granted(), 0.3)
    assert isinstance(submit, Submit)
    state.accepted(submit)
    lost = Transfer("nixl", "pull", 0, 0.1, "peer", "q1.0")
    moved = Transfer("ucx", "pull", 30, 0.1, "", "q1.0")
    end = EngineOutput("q1.0", [6], reason=Reason.LENGTH)
    state.stepped(Step(transfers=[lost, moved], outputs=[end]), 0.4)
    told = [action.event for action in state.completed(submit.task, Reason.LENGTH, 0.5) if isinstance(action, Tell)]
    assert [event.moved_bytes for event in told if isinstance(event, Finished)] == [630]
