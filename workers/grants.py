"""Which grants a worker takes, which it refuses, and what it makes of them."""

from __future__ import annotations

from llmserve.bus.base import StoredRequest
from llmserve.bus.cache_salt import CacheSalts
from llmserve.bus.messages import Grant, HandedOff, MessageError, Request, Role, decode
from llmserve.workers.actions import Action, Fetch, Status, Submit, Task, Tell
from llmserve.workers.ahead import Aheads
from llmserve.workers.engine.base import EngineInfo, Work
from llmserve.workers.reports import Reports, stage_of
from llmserve.workers.tasks import Tasks


class Grants:
    """Decides about each grant of the leader; one is known by its sequence, so that one delivered twice runs once."""

    def __init__(
        self, role: Role, info: EngineInfo, tasks: Tasks, reports: Reports, salts: CacheSalts, aheads: Aheads
    ) -> None:
        self.draining = False
        self.fetching: dict[int, Grant] = {}
        """Taken, and their requests are on their way from the stream."""
        self._role = role
        self._stage = stage_of(role)
        self._info = info
        self._tasks = tasks
        self._reports = reports
        self._salts = salts
        self._aheads = aheads

    def granted(self, grant: Grant, now_s: float) -> list[Action]:
        """Accept a grant, refuse it, or answer again if it came before."""
        again = self._answer_again(grant, now_s)
        if again is not None:
            return again
        if grant.stage is not self._stage:
            return [self._reports.refused(grant, f"a {self._role} worker does not run {grant.stage}")]
        if self.draining:
            return [self._reports.refused(grant, "draining")]
        if self._tasks.count(Status.RUNNING) + len(self.fetching) >= self._info.slots:
            return [self._reports.refused(grant, f"all {self._info.slots} slots are taken")]
        if self._tasks.count(Status.ENDING) > 4 * self._info.slots:
            return [self._reports.refused(grant, "the bus does not take results fast enough")]
        if (request := self._aheads.request(grant.seq, now_s)) is not None:
            return self._consider(grant, request, now_s)
        if not grant.request:
            self.fetching[grant.seq] = grant
            return [Fetch(grant)]
        return self._read(grant, grant.request, now_s)

    def fetched(self, grant: Grant, stored: StoredRequest | None, now_s: float) -> list[Action]:
        """The request of a grant that came without it; None if it is not on the stream any more."""
        if self.fetching.pop(grant.seq, None) is None:
            return []
        if stored is None:
            # Cancelled or completed meanwhile. Its id is not known here, and the router goes by the sequence.
            return [self._reports.not_run(grant, "")]
        if self.draining:
            return [self._reports.refused(grant, "draining")]
        return self._consider(grant, stored.request, now_s)

    def not_fetched(self, grant: Grant, error: str) -> list[Action]:
        """The bus did not say whether the request is there."""
        if self.fetching.pop(grant.seq, None) is None:
            return []
        return [self._reports.refused(grant, error)]

    def accepted(self, submit: Submit) -> list[Action]:
        """The engine took the work."""
        return [self._reports.accepted(submit.grant)]

    def refused(self, submit: Submit, error: str, *, retry: bool) -> list[Action]:
        """The engine did not take the work. ``retry``: another worker may."""
        self._tasks.remove(submit.task)
        return [self._reports.refused(submit.grant, error, retry=retry)]

    def give_up(self, cause: str) -> list[Action]:
        """Refuse what was taken and has not come from the stream yet."""
        refusals: list[Action] = [self._reports.refused(grant, cause) for grant in self.fetching.values()]
        self.fetching.clear()
        return refusals

    def check(self) -> None:
        """Assert that no grant is taken twice, and none beyond the slots."""
        assert not set(self.fetching) & set(self._tasks.by_seq)
        assert self._tasks.count(Status.RUNNING) + len(self.fetching) <= self._info.slots

    def _answer_again(self, grant: Grant, now_s: float) -> list[Action] | None:
        """The answer to a grant that came before; None if it is new."""
        if grant.seq in self.fetching:
            return []
        task = self._tasks.get(grant.seq)
        if task is not None:
            if task.handed_off is not None and not task.cancelled:
                return self._reports.handed_off_again(task, now_s)
            return [self._reports.accepted(grant)]
        ended = self._tasks.ended(grant.seq, now_s)
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
        newest = self._tasks.newest(request.request_id)
        # The same attempt under another sequence was stored twice: one of them runs.
        outdated = newest is not None and newest.request.attempt >= request.attempt
        if outdated or self._tasks.forbidden(request.request_id, now_s):
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
        return [*self._tasks.cancel(superseded), self._take(grant, request, handed_off, now_s)]

    def _problem(self, request: Request) -> str:
        """Why no worker of this kind can ever run the request; empty if one can."""
        info = self._info
        if request.api != info.api:
            return f"the request is for engine API {request.api!r}, this engine's is {info.api!r}"
        if request.prompt_tokens >= info.max_model_len:
            return f"{request.prompt_tokens} prompt tokens leave no room for output in {info.max_model_len}"
        if info.page_tokens and -(-request.prompt_tokens // info.page_tokens) > info.pages_total:
            return f"{request.prompt_tokens} prompt tokens do not fit into {info.pages_total} pages"
        return ""

    def _take(self, grant: Grant, request: Request, handed_off: HandedOff | None, now_s: float) -> Submit:
        first_tokens = tuple(handed_off.tokens) if handed_off is not None else ()
        work_id = f"{request.request_id}.{request.attempt}"
        task = Task(
            seq=grant.seq,
            tenant=grant.tenant,
            stage=grant.stage,
            request=request,
            work_id=work_id,
            sent=len(first_tokens),
            moved_bytes=self._aheads.moved_bytes(work_id, now_s),
        )
        self._tasks.add(task)
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
