"""Properties of a worker's decisions over random histories."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from llmserve.bus.base import StoredRequest
from llmserve.bus.messages import (
    Cancel,
    Failed,
    Finished,
    Grant,
    HandedOff,
    Reason,
    Request,
    Role,
    Stage,
    Sync,
    encode,
)
from llmserve.workers.actions import Abort, Action, Complete, Deliver, Fetch, Status, Submit, Task, Tell
from llmserve.workers.engine.base import EngineInfo, EngineLoad, EngineOutput, Step
from llmserve.workers.engine.wire import API
from llmserve.workers.recent import Recent
from llmserve.workers.reports import Identity, stage_of
from llmserve.workers.state import WorkerState
from tests.workers.world import request

INFO = EngineInfo(API, "f", 1024, slots=3, step_tokens=64, pages_total=64, page_tokens=16, page_bytes=100)
STAGES = st.sampled_from([Role.PREFILL, Role.DECODE, Role.BOTH])


class History:
    """A worker's state under an engine, a bus and a router that do anything that they may do."""

    def __init__(self, role: Role, seed: int) -> None:
        self.rng = random.Random(seed)
        self.state = WorkerState(Identity("w", role), INFO, lease_s=5.0, remember_s=20.0)
        self.role = role
        self.now_s = 0.0
        self.epoch = 1
        self.in_engine: dict[str, Task] = {}
        self.held: set[str] = set()
        self.aborted: list[str] = []
        self.fetches: list[Grant] = []
        self.completing: list[Complete] = []
        self.sent: Counter[tuple[str, int]] = Counter()
        self.ends: list[Finished | Failed] = []
        self.accepted: Counter[int] = Counter()
        self.submitted: Counter[int] = Counter()
        self.grants: dict[int, Grant] = {}
        self.items: dict[int, Request] = {}
        self.seq = 0

    def act(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Submit(task, grant, work):
                    if self.rng.random() < 0.1:
                        self.act(self.state.refused(action, "no", retry=False))
                    else:
                        assert work.work_id not in self.in_engine
                        self.in_engine[work.work_id] = task
                        self.submitted[grant.seq] += 1
                        self.act(self.state.accepted(action))
                case Abort(work_ids):
                    self.aborted += [w for w in work_ids if w in self.in_engine or w in self.held]
                case Fetch(grant):
                    self.fetches.append(grant)
                case Complete():
                    self.completing.append(action)
                case Deliver(_, deltas):
                    for delta in deltas.items:
                        key = (delta.request_id, delta.attempt)
                        assert delta.offset == self.sent[key]
                        self.sent[key] += len(delta.tokens)
                case Tell(event):
                    if isinstance(event, Finished | Failed):
                        self.ends.append(event)
                    elif isinstance(event, HandedOff):
                        assert 0 < event.lease_s < 5.001
        self.state.check()

    # -- what may happen

    def grant(self) -> None:
        self.seq += 1
        rid, attempt = f"r{self.rng.randint(0, 5)}", self.rng.randint(0, 2)
        if (rid, attempt) in self.sent:
            rid = f"{rid}-{self.seq}"
        self.sent[(rid, attempt)] = 0
        item = request(rid, attempt=attempt, max_tokens=self.rng.randint(1, 4))
        grant = Grant(
            epoch=self.rng.choice([self.epoch, self.epoch, self.epoch - 1]),
            seq=self.seq,
            tenant="t",
            klass="i",
            stage=stage_of(self.role),
            attempt=attempt,
            request=self.rng.choice([encode(item), encode(item), b""]),
        )
        self.grants[self.seq] = grant
        self.items[self.seq] = item
        self.act(self.state.granted(grant, self.now_s))

    def grant_again(self) -> None:
        if self.grants:
            grant = self.rng.choice(list(self.grants.values()))
            known = grant.seq in self.state.tasks
            if not known:
                item = self.items[grant.seq]
                self.sent[(item.request_id, item.attempt)] = 0
            before = self.submitted[grant.seq]
            self.act(self.state.granted(grant, self.now_s))
            assert not known or self.submitted[grant.seq] == before

    def fetched(self) -> None:
        if self.fetches:
            grant = self.fetches.pop(self.rng.randrange(len(self.fetches)))
            item = self.items[grant.seq]
            kind = self.rng.choice(["stored", "gone", "error"])
            if kind == "error":
                self.act(self.state.not_fetched(grant, "no answer"))
            else:
                stored = StoredRequest(grant.seq, "t", "i", item, encode(item)) if kind == "stored" else None
                self.act(self.state.fetched(grant, stored, self.now_s))

    def step(self) -> None:
        outputs, released = [], []
        for work_id in self.aborted:
            if self.in_engine.pop(work_id, None):
                outputs.append(EngineOutput(work_id, [], Reason.CANCELLED))
            elif work_id in self.held:
                released.append(work_id)
        self.aborted.clear()
        for work_id in list(self.in_engine):
            if self.rng.random() < 0.6:
                outputs.append(self.output(work_id))
        released += [work_id for work_id in self.held if self.rng.random() < 0.2 and work_id not in released]
        self.held.difference_update(released)
        self.act(self.state.stepped(Step(outputs=outputs, released=released), self.now_s))

    def output(self, work_id: str) -> EngineOutput:
        kind = self.rng.choice(["token", "token", "stop", "error"])
        if self.role is Role.PREFILL and kind == "token":
            del self.in_engine[work_id]
            self.held.add(work_id)
            return EngineOutput(work_id, [7], handoff=b"h", pages=1, cached_tokens=0)
        if kind == "token":
            return EngineOutput(work_id, [7])
        del self.in_engine[work_id]
        return EngineOutput(work_id, [7] if kind == "stop" else [], Reason.STOP if kind == "stop" else Reason.ERROR)

    def complete(self) -> None:
        if self.completing:
            action = self.completing.pop(0)
            done = self.rng.random() < 0.9
            self.act(
                self.state.completed(action.task, action.result.reason, self.now_s)
                if done
                else self.state.not_completed(action.task, "bus", self.now_s)
            )

    def cancel(self) -> None:
        self.act(self.state.cancelled(Cancel(request_ids=[f"r{self.rng.randint(0, 5)}"]), self.now_s))

    def sync(self) -> None:
        self.epoch += 1
        self.act(self.state.synced(Sync(epoch=self.epoch, router="x"), self.now_s))
        assert self.state.epoch == self.epoch

    def pause(self) -> None:
        self.now_s += self.rng.random() * 4

    def settle(self) -> None:
        """Whatever happened, everything comes to its end."""
        for _ in range(500):
            if self.state.idle:
                return
            self.fetched()
            self.step()
            self.complete()
        raise AssertionError("it never became idle")


@settings(deadline=None)
@given(STAGES, st.integers(0, 2**32))
def test_in_every_history_all_accepted_work_ends_once_and_nothing_is_left(role: Role, seed: int) -> None:
    history = History(role, seed)
    moves = [
        *[history.grant] * 4,
        history.grant_again,
        *[history.step] * 4,
        *[history.complete] * 2,
        history.fetched,
        history.cancel,
        history.sync,
        history.pause,
    ]
    for _ in range(120):
        history.rng.choice(moves)()
        beat = history.state.heartbeat(EngineLoad())
        assert len({line.seq for line in beat.running}) == len(beat.running)
        assert sum(not line.held for line in beat.running) <= INFO.slots + history.state.count(Status.ENDING)
    history.settle()
    assert history.state.heartbeat(EngineLoad()).running == []
    assert not history.in_engine


@settings(deadline=None)
@given(STAGES, st.integers(0, 2**32))
def test_giving_up_ends_all_but_what_is_being_recorded(role: Role, seed: int) -> None:
    history = History(role, seed)
    for _ in range(40):
        history.rng.choice([history.grant, history.grant, history.step])()
    recording = history.state.count(Status.ENDING)
    running = set(history.state.tasks) - {action.task.seq for action in history.completing}
    history.ends.clear()
    history.act(history.state.give_up("over", history.now_s))
    assert {end.seq for end in history.ends} == running
    assert len(history.state.tasks) == recording


def test_one_attempt_under_two_sequences_runs_once() -> None:
    history = History(Role.BOTH, seed=1)
    grant = Grant(epoch=1, seq=1, tenant="t", klass="i", stage=Stage.WHOLE, attempt=0, request=encode(request("r")))
    first = history.state.granted(grant, 0.0)
    second = history.state.granted(replace(grant, seq=2), 0.0)
    assert isinstance(first[0], Submit)
    assert isinstance(second[0], Tell)
    assert isinstance(second[0].event, Finished)
    assert second[0].event.seq == 2


def test_what_is_remembered_is_forgotten_after_its_time() -> None:
    recent: Recent[str, int] = Recent(10.0)
    recent.set("a", 1, 0.0)
    recent.set("b", 2, 5.0)
    recent.set("a", 3, 6.0)
    assert (recent.get("a", 15.0), recent.get("b", 15.1)) == (3, None)
    assert recent.get("a", 16.0) is None
    assert len(recent) == 0


def test_only_work_of_the_stage_of_its_role_is_run() -> None:
    assert [stage_of(role) for role in (Role.PREFILL, Role.DECODE, Role.BOTH)] == [
        Stage.PREFILL,
        Stage.DECODE,
        Stage.WHOLE,
    ]
