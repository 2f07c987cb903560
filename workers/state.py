"""A worker's decisions, without I/O: grants, cancellations and engine steps in, actions out."""

from __future__ import annotations

from collections.abc import Mapping

from llmserve.bus.base import StoredRequest
from llmserve.bus.cache_salt import CacheSalts
from llmserve.bus.messages import (
    Cancel,
    Delta,
    Deltas,
    Grant,
    Heartbeat,
    Reason,
    Running,
    Sync,
)
from llmserve.workers.actions import Abort, Action, Beat, Complete, Deliver, Status, Submit, Task, Tell
from llmserve.workers.ahead import Aheads
from llmserve.workers.engine.base import EngineInfo, EngineLoad, EngineOutput, Step, Transfer
from llmserve.workers.grants import Grants
from llmserve.workers.reports import Identity, Reports, stage_of
from llmserve.workers.tasks import Tasks


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
        self._lease_s = lease_s
        self._reports = Reports(identity.member)
        self._tasks = Tasks(remember_s)
        salts = salts or CacheSalts("", {})
        self._aheads = Aheads(stage_of(identity.role), lease_s, salts)
        self._grants = Grants(identity.role, info, self._tasks, self._reports, salts, self._aheads)

    # -- what it is ------------------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Whether nothing is accepted that is not over."""
        return not self._tasks and not self._grants.fetching

    @property
    def tasks(self) -> Mapping[int, Task]:
        """What is accepted and not over, by sequence."""
        return self._tasks.by_seq

    @property
    def draining(self) -> bool:
        """Whether no more grants are taken."""
        return self._grants.draining

    def tenant_of(self, work_id: str, now_s: float) -> str:
        """Whose work it is; empty if it is not here any more."""
        task = self._tasks.of_work(work_id)
        return task.tenant if task is not None else self._aheads.tenant_of(work_id, now_s)

    def count(self, status: Status) -> int:
        return self._tasks.count(status)

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
            for task in self._tasks
        ]
        fetching = self._grants.fetching.values()
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
            page_bytes=info.page_bytes,
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
        return self._aheads.granted(grant, now_s) if grant.ahead else self._grants.granted(grant, now_s)

    def fetched(self, grant: Grant, stored: StoredRequest | None, now_s: float) -> list[Action]:
        """The request of a grant that came without it; None if it is not on the stream any more."""
        if grant.ahead:
            return self._aheads.fetched(grant, stored, now_s)
        return self._grants.fetched(grant, stored, now_s)

    def not_fetched(self, grant: Grant, error: str) -> list[Action]:
        """The bus did not say whether the request is there."""
        return self._grants.not_fetched(grant, error)

    def accepted(self, submit: Submit) -> list[Action]:
        """The engine took the work."""
        return self._grants.accepted(submit)

    def refused(self, submit: Submit, error: str, *, retry: bool) -> list[Action]:
        """The engine did not take the work. ``retry``: another worker may."""
        return self._grants.refused(submit, error, retry=retry)

    # -- engine steps ----------------------------------------------------------------------------------------------

    def stepped(self, step: Step, now_s: float) -> list[Action]:
        """Deltas, one message for each gateway, then what ended or was handed off."""
        items: dict[str, list[Delta]] = {}
        ends: list[Action] = []
        for transfer in step.transfers:
            self._moved(transfer, now_s)
        for output in step.outputs:
            task = self._tasks.of_work(output.work_id)
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
        for offer in step.offers:
            task = self._tasks.of_work(offer.work_id)
            if task is not None and task.status is Status.RUNNING and not task.cancelled:
                ends.append(Tell(self._reports.prefilling(task, offer)))
        for work_id in step.released:
            ends += self._released(work_id, now_s)
        member = self.identity.member
        deliveries: list[Action] = [
            Deliver(gateway, Deltas(worker=member, items=deltas)) for gateway, deltas in items.items()
        ]
        return deliveries + ends + ([Beat()] if ends or step.released else [])

    def _moved(self, transfer: Transfer, now_s: float) -> None:
        task = self._tasks.of_work(transfer.work_id)
        if task is not None:
            task.moved_bytes += transfer.bytes_moved
        else:
            self._aheads.moved(transfer.work_id, transfer.bytes_moved, now_s)

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
        self._tasks.move(task, Status.HELD)
        task.lease_until_s = now_s + self._lease_s
        task.handed_off = self._reports.handed_off(task, output, self.info.page_bytes, self._lease_s)
        if task.cancelled:
            return [Abort([task.work_id])]
        return [Tell(task.handed_off)]

    def _end(self, task: Task, reason: Reason, error: str, now_s: float) -> list[Action]:
        if task.cancelled:
            return [self._tasks.over(task, self._reports.finished(task, Reason.CANCELLED), now_s)]
        if reason in (Reason.CANCELLED, Reason.ERROR):
            return [
                self._tasks.over(task, self._reports.failed(task, error or f"the engine ended it: {reason}"), now_s)
            ]
        self._tasks.move(task, Status.ENDING)
        return [Complete(task, self._reports.result(task, reason))]

    def completed(self, task: Task, reason: Reason, now_s: float) -> list[Action]:
        """The result is recorded."""
        if self._tasks.get(task.seq) is not task:
            return []
        return [self._tasks.over(task, self._reports.finished(task, reason), now_s), Beat()]

    def not_completed(self, task: Task, error: str, now_s: float) -> list[Action]:
        """The result cannot be recorded."""
        if self._tasks.get(task.seq) is not task:
            return []
        return [self._tasks.over(task, self._reports.failed(task, error), now_s), Beat()]

    def _released(self, work_id: str, now_s: float) -> list[Action]:
        task = self._tasks.of_work(work_id)
        if task is None or task.status is not Status.HELD:
            return []
        if task.cancelled:
            return [self._tasks.over(task, self._reports.finished(task, Reason.CANCELLED), now_s)]
        self._tasks.remove(task)
        return []

    # -- control ---------------------------------------------------------------------------------------------------

    def cancelled(self, cancel: Cancel, now_s: float) -> list[Action]:
        """Stop these requests here, and, if their gateway says so, do not start them within the next minute. A router
        takes a silent gateway for dead; if it is not, it sends them again."""
        if 0 < cancel.epoch < self.epoch:
            return []
        ids = set(cancel.request_ids)
        if not cancel.epoch:
            self._tasks.forbid(ids, now_s)
        running = self._tasks.cancel(task for task in self._tasks if task.request.request_id in ids)
        return running + self._aheads.cancel(ids, now_s, for_good=not cancel.epoch)

    def synced(self, sync: Sync, now_s: float) -> list[Action]:
        """Show a new leader everything: the inventory, and handoffs that it may not have heard of."""
        if sync.epoch < self.epoch:
            return []
        self.epoch = sync.epoch
        actions: list[Action] = [Beat(at_once=True)]
        for task in self._tasks:
            if task.handed_off is not None and not task.cancelled:
                actions += self._reports.handed_off_again(task, now_s)
        return actions

    def drain(self) -> list[Action]:
        """Take no more grants."""
        self._grants.draining = True
        return [Beat(at_once=True)]

    def give_up(self, cause: str, now_s: float, *, died: bool = False) -> list[Action]:
        """Fail all that the engine still has; results being recorded go on. ``died``: the engine, of whatever ran."""
        tasks = [task for task in self._tasks if task.status is not Status.ENDING]
        actions = self._grants.give_up(cause)
        for task in tasks:
            end = (
                self._reports.finished(task, Reason.CANCELLED)
                if task.cancelled
                else self._reports.failed(task, cause, died=died and not task.held)
            )
            actions.append(self._tasks.over(task, end, now_s))
        return [Abort([task.work_id for task in tasks]), *actions, Beat()] if tasks else actions

    def check(self) -> None:
        """Assert every invariant."""
        self._tasks.check()
        self._grants.check()
