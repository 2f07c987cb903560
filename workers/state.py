"""A worker's decisions, without I/O: grants, cancellations and engine steps in, actions out."""

from __future__ import annotations

from msgspec.structs import replace

from llmserve.bus.base import StoredRequest
from llmserve.bus.cache_salt import CacheSalts
from llmserve.bus.messages import (
    Cancel,
    Delta,
    Deltas,
    Failed,
    Finished,
    Grant,
    HandedOff,
    Heartbeat,
    MessageError,
    Reason,
    Request,
    Running,
    Sync,
    decode,
)
from llmserve.workers.actions import Abort, Action, Beat, Complete, Deliver, Fetch, Status, Submit, Task, Tell
from llmserve.workers.engine.base import EngineInfo, EngineLoad, EngineOutput, Step, Work
from llmserve.workers.recent import Recent
from llmserve.workers.reports import Identity, Reports, stage_of


class WorkerState:
    """Everything that one worker has accepted. Times are seconds of one clock that never goes back.

    A grant is known by its sequence, which no other attempt shares, so that one delivered twice runs once.
    """

    def __init__(
        self,
        identity: Identity,
        info: EngineInfo,
        *,
        lease_s: float,
        remember_s: float = 60.0,
        salts: CacheSalts | None = None,
    ) -> None:
        self.identity = identity
        self.info = info
        self.epoch = 0
        self.draining = False
        self.tasks: dict[int, Task] = {}
        self._lease_s = lease_s
        self._salts = salts or CacheSalts("", {})
        self._stage = stage_of(identity.role)
        self._reports = Reports(identity.member)
        self._by_work: dict[str, Task] = {}
        self._by_request: dict[str, Task] = {}
        """The newest attempt of each request."""
        self._fetching: dict[int, Grant] = {}
        self._counts = dict.fromkeys(Status, 0)
        self._cancelled: Recent[str, bool] = Recent(remember_s)
        self._ended: Recent[int, Finished | Failed] = Recent(remember_s)

    # -- what it is ------------------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Whether nothing is accepted that is not over."""
        return not self.tasks and not self._fetching

    def count(self, status: Status) -> int:
        return self._counts[status]

    @property
    def prefill_tokens(self) -> int:
        """Credit of prompt tokens: two steps' worth, so that the next step's prompts are here when one ends."""
        return 2 * self.info.step_tokens

    def heartbeat(self, load: EngineLoad, *, leaving: bool = False) -> Heartbeat:
        info, identity = self.info, self.identity
        inventory = [
            Running(
                task.seq,
                task.request.attempt,
                task.stage,
                task.held,
                task.tenant,
                task.request.prompt_tokens,
                task.request.max_tokens,
            )
            for task in self.tasks.values()
        ]
        fetching = self._fetching.values()
        inventory += [Running(grant.seq, grant.attempt, grant.stage, tenant=grant.tenant) for grant in fetching]
        return Heartbeat(
            member=identity.member,
            role=identity.role,
            host=identity.host,
            pid=identity.pid,
            epoch=self.epoch,
            draining=self.draining,
            leaving=leaving,
            api=info.api,
            fingerprint=info.fingerprint,
            transports=info.transports,
            slots=info.slots,
            prefill_tokens=self.prefill_tokens,
            pages_total=info.pages_total,
            pages_free=load.pages_free,
            page_tokens=info.page_tokens,
            max_model_len=info.max_model_len,
            metrics_port=identity.metrics_port,
            running=inventory,
        )

    # -- grants ----------------------------------------------------------------------------------------------------

    def granted(self, grant: Grant, now_s: float) -> list[Action]:
        """Accept a grant, refuse it, or answer again if it came before."""
        if grant.epoch < self.epoch:
            return [self._reports.refused(grant, f"epoch {grant.epoch} is over, {self.epoch} leads")]
        self.epoch = grant.epoch
        again = self._answer_again(grant, now_s)
        if again is not None:
            return again
        if grant.stage is not self._stage:
            return [self._reports.refused(grant, f"a {self.identity.role} worker does not run {grant.stage}")]
        if self.draining:
            return [self._reports.refused(grant, "draining")]
        if self._counts[Status.RUNNING] + len(self._fetching) >= self.info.slots:
            return [self._reports.refused(grant, f"all {self.info.slots} slots are taken")]
        if self._counts[Status.ENDING] > 4 * self.info.slots:
            return [self._reports.refused(grant, "the bus does not take results fast enough")]
        if not grant.request:
            self._fetching[grant.seq] = grant
            return [Fetch(grant)]
        return self._read(grant, grant.request, now_s)

    def fetched(self, grant: Grant, stored: StoredRequest | None, now_s: float) -> list[Action]:
        """The request of a grant that came without it; None if it is not on the stream any more."""
        if self._fetching.pop(grant.seq, None) is None:
            return []
        if stored is None:
            # Cancelled or completed meanwhile. Its id is not known here, and the router goes by the sequence.
            return [self._reports.not_run(grant, "")]
        if self.draining:
            return [self._reports.refused(grant, "draining")]
        return self._consider(grant, stored.request, now_s)

    def not_fetched(self, grant: Grant, error: str) -> list[Action]:
        """The bus did not say whether the request is there."""
        if self._fetching.pop(grant.seq, None) is None:
            return []
        return [self._reports.refused(grant, error)]

    def accepted(self, submit: Submit) -> list[Action]:
        """The engine took the work."""
        return [self._reports.accepted(submit.grant)]

    def refused(self, submit: Submit, error: str, *, retry: bool) -> list[Action]:
        """The engine did not take the work. ``retry``: another worker may."""
        self._remove(submit.task)
        return [self._reports.refused(submit.grant, error, retry=retry)]

    def _answer_again(self, grant: Grant, now_s: float) -> list[Action] | None:
        """The answer to a grant that came before; None if it is new."""
        if grant.seq in self._fetching:
            return []
        task = self.tasks.get(grant.seq)
        if task is not None:
            if task.handed_off is not None and not task.cancelled:
                return self._handed_off_again(task, now_s)
            return [self._reports.accepted(grant)]
        ended = self._ended.get(grant.seq, now_s)
        return None if ended is None else [Tell(ended)]

    def _read(self, grant: Grant, data: bytes, now_s: float) -> list[Action]:
        try:
            request = decode(data)
        except MessageError as error:
            return [self._reports.refused(grant, str(error), retry=False)]
        if not isinstance(request, Request):
            return [
                self._reports.refused(grant, f"a grant of a {type(request).__name__}, not of a Request", retry=False)
            ]
        return self._consider(grant, request, now_s)

    def _consider(self, grant: Grant, request: Request, now_s: float) -> list[Action]:
        newest = self._by_request.get(request.request_id)
        # The same attempt under another sequence was stored twice: one of them runs.
        outdated = newest is not None and newest.request.attempt >= request.attempt
        if outdated or self._cancelled.get(request.request_id, now_s):
            return [self._reports.not_run(grant, request.request_id)]
        problem = self._problem(request)
        if problem:
            return [self._reports.refused(grant, problem, retry=False)]
        handed_off: HandedOff | None = None
        if grant.handoff:
            try:
                message = decode(grant.handoff)
            except MessageError as error:
                return [self._reports.refused(grant, f"handoff: {error}", retry=False)]
            handed_off = message if isinstance(message, HandedOff) else None
        superseded = [newest] if newest is not None and not newest.cancelled else []
        return [*self._cancel(superseded), self._take(grant, request, handed_off)]

    def _problem(self, request: Request) -> str:
        """Why no worker of this kind can ever run the request; empty if one can."""
        info = self.info
        if request.api != info.api:
            return f"the request is for engine API {request.api!r}, this engine's is {info.api!r}"
        if request.prompt_tokens >= info.max_model_len:
            return f"{request.prompt_tokens} prompt tokens leave no room for output in {info.max_model_len}"
        if info.page_tokens and -(-request.prompt_tokens // info.page_tokens) > info.pages_total:
            return f"{request.prompt_tokens} prompt tokens do not fit into {info.pages_total} pages"
        return ""

    def _take(self, grant: Grant, request: Request, handed_off: HandedOff | None) -> Submit:
        first_tokens = tuple(handed_off.tokens) if handed_off is not None else ()
        task = Task(
            seq=grant.seq,
            tenant=grant.tenant,
            stage=grant.stage,
            request=request,
            work_id=f"{request.request_id}.{request.attempt}",
            sent=len(first_tokens),
        )
        self.tasks[task.seq] = self._by_work[task.work_id] = self._by_request[request.request_id] = task
        self._counts[Status.RUNNING] += 1
        work = Work(
            work_id=task.work_id,
            stage=grant.stage,
            body=request.body,
            whole_output=request.whole_output,
            first_tokens=first_tokens,
            handoff=handed_off.params if handed_off is not None else b"",
            tenant=grant.tenant,
            owner_salt=self._salts.owner(grant.tenant),
        )
        return Submit(task, grant, work)

    # -- engine steps ----------------------------------------------------------------------------------------------

    def stepped(self, step: Step, now_s: float) -> list[Action]:
        """Deltas, one message for each gateway, then what ended or was handed off."""
        items: dict[str, list[Delta]] = {}
        ends: list[Action] = []
        for output in step.outputs:
            task = self._by_work.get(output.work_id)
            if task is None or task.status is not Status.RUNNING:
                continue
            if output.cached_tokens is not None:
                task.cached_tokens = output.cached_tokens
            if not task.cancelled:
                delta = self._delta(task, output)
                if delta is not None:
                    items.setdefault(task.request.gateway, []).append(delta)
            if output.handoff:
                ends += self._hold(task, output, now_s)
            elif output.reason is not None:
                ends += self._end(task, output.reason, output.error, now_s)
        for work_id in step.released:
            ends += self._released(work_id, now_s)
        member = self.identity.member
        deliveries: list[Action] = [
            Deliver(gateway, Deltas(worker=member, items=deltas)) for gateway, deltas in items.items()
        ]
        return deliveries + ends + ([Beat()] if ends or step.released else [])

    @staticmethod
    def _delta(task: Task, output: EngineOutput) -> Delta | None:
        """The gateway's part of an output; None if it is to hear nothing of it."""
        if output.reason in (Reason.CANCELLED, Reason.ERROR):
            # The attempt is over and the request is not: what follows is the router's or the next attempt's to say.
            return None
        if output.handoff and task.request.whole_output:
            return None
        offset = task.request.offset + task.sent
        task.sent += len(output.tokens)
        return Delta(
            request_id=task.request.request_id,
            attempt=task.request.attempt,
            offset=offset,
            tokens=output.tokens,
            reason=output.reason,
            stop_reason=output.stop_reason,
            cached_tokens=output.cached_tokens,
            extra=output.extra,
        )

    def _hold(self, task: Task, output: EngineOutput, now_s: float) -> list[Action]:
        self._move(task, Status.HELD)
        task.lease_until_s = now_s + self._lease_s
        task.handed_off = self._reports.handed_off(task, output, self.info.page_bytes, self._lease_s)
        if task.cancelled:
            return [Abort([task.work_id])]
        return [Tell(task.handed_off)]

    def _end(self, task: Task, reason: Reason, error: str, now_s: float) -> list[Action]:
        if task.cancelled:
            return [self._over(task, self._reports.finished(task, Reason.CANCELLED), now_s)]
        if reason in (Reason.CANCELLED, Reason.ERROR):
            return [self._over(task, self._reports.failed(task, error or f"the engine ended it: {reason}"), now_s)]
        self._move(task, Status.ENDING)
        return [Complete(task, self._reports.result(task, reason))]

    def completed(self, task: Task, reason: Reason, now_s: float) -> list[Action]:
        """The result is recorded."""
        if self.tasks.get(task.seq) is not task:
            return []
        return [self._over(task, self._reports.finished(task, reason), now_s), Beat()]

    def not_completed(self, task: Task, error: str, now_s: float) -> list[Action]:
        """The result cannot be recorded."""
        if self.tasks.get(task.seq) is not task:
            return []
        return [self._over(task, self._reports.failed(task, error), now_s), Beat()]

    def _released(self, work_id: str, now_s: float) -> list[Action]:
        task = self._by_work.get(work_id)
        if task is None or task.status is not Status.HELD:
            return []
        if task.cancelled:
            return [self._over(task, self._reports.finished(task, Reason.CANCELLED), now_s)]
        self._remove(task)
        return []

    # -- control ---------------------------------------------------------------------------------------------------

    def cancelled(self, cancel: Cancel, now_s: float) -> list[Action]:
        """Stop these requests here, and do not start them within the next minute."""
        if 0 < cancel.epoch < self.epoch:
            return []
        ids = set(cancel.request_ids)
        for request_id in ids:
            self._cancelled.set(request_id, True, now_s)
        return self._cancel([task for task in self.tasks.values() if task.request.request_id in ids])

    def synced(self, sync: Sync, now_s: float) -> list[Action]:
        """Show a new leader everything: the inventory, and handoffs that it may not have heard of."""
        if sync.epoch < self.epoch:
            return []
        self.epoch = sync.epoch
        actions: list[Action] = [Beat(at_once=True)]
        for task in self.tasks.values():
            if task.handed_off is not None and not task.cancelled:
                actions += self._handed_off_again(task, now_s)
        return actions

    def drain(self) -> list[Action]:
        """Take no more grants."""
        self.draining = True
        return [Beat(at_once=True)]

    def give_up(self, cause: str, now_s: float, *, died: bool = False) -> list[Action]:
        """Fail all that the engine still has; results being recorded go on. ``died``: the engine, of whatever ran."""
        tasks = [task for task in self.tasks.values() if task.status is not Status.ENDING]
        actions: list[Action] = [self._reports.refused(grant, cause) for grant in self._fetching.values()]
        self._fetching.clear()
        for task in tasks:
            end = (
                self._reports.finished(task, Reason.CANCELLED)
                if task.cancelled
                else self._reports.failed(task, cause, died=died and not task.held)
            )
            actions.append(self._over(task, end, now_s))
        return [Abort([task.work_id for task in tasks]), *actions, Beat()] if tasks else actions

    def _cancel(self, tasks: list[Task]) -> list[Action]:
        work_ids = []
        for task in tasks:
            if not task.cancelled and task.status is not Status.ENDING:
                task.cancelled = True
                work_ids.append(task.work_id)
        return [Abort(work_ids)] if work_ids else []

    def _handed_off_again(self, task: Task, now_s: float) -> list[Action]:
        left_s = task.lease_until_s - now_s
        if task.handed_off is None or left_s <= 0:
            return []
        return [Tell(replace(task.handed_off, lease_s=left_s))]

    # -- bookkeeping -----------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Assert that the indices agree with each other."""
        tasks = list(self.tasks.values())
        assert all(task.seq == seq for seq, task in self.tasks.items())
        assert {task.work_id for task in tasks} == set(self._by_work)
        assert {task.request.request_id for task in tasks} == set(self._by_request)
        for status in Status:
            assert self._counts[status] == sum(task.status is status for task in tasks)
        assert all((task.handed_off is not None) == (task.status is Status.HELD) for task in tasks)
        assert not set(self._fetching) & set(self.tasks)
        assert self._counts[Status.RUNNING] + len(self._fetching) <= self.info.slots

    def _move(self, task: Task, status: Status) -> None:
        self._counts[task.status] -= 1
        self._counts[status] += 1
        task.status = status

    def _over(self, task: Task, event: Finished | Failed, now_s: float) -> Tell:
        self._remove(task)
        self._ended.set(task.seq, event, now_s)
        return Tell(event)

    def _remove(self, task: Task) -> None:
        self._counts[task.status] -= 1
        del self.tasks[task.seq]
        del self._by_work[task.work_id]
        request_id = task.request.request_id
        if self._by_request[request_id] is task:
            older = [other for other in self.tasks.values() if other.request.request_id == request_id]
            if older:
                self._by_request[request_id] = max(older, key=lambda other: other.request.attempt)
            else:
                del self._by_request[request_id]
