"""What a worker has accepted and not ended yet, and what it remembers of the rest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from llmserve.bus.messages import Failed, Finished
from llmserve.workers.actions import Abort, Action, Status, Task, Tell
from llmserve.workers.recent import Recent


class Tasks:
    """Tasks by sequence, by work and by request; moves keep the indices and counts consistent and decide nothing."""

    def __init__(self, remember_s: float) -> None:
        self._by_seq: dict[int, Task] = {}
        self._by_work: dict[str, Task] = {}
        self._by_request: dict[str, Task] = {}
        """The newest attempt of each request."""
        self._counts = dict.fromkeys(Status, 0)
        self._cancelled: Recent[str, bool] = Recent(remember_s)
        self._ended: Recent[int, Finished | Failed] = Recent(remember_s)

    @property
    def by_seq(self) -> Mapping[int, Task]:
        return self._by_seq

    def __iter__(self) -> Iterator[Task]:
        return iter(list(self._by_seq.values()))

    def __len__(self) -> int:
        return len(self._by_seq)

    def get(self, seq: int) -> Task | None:
        return self._by_seq.get(seq)

    def of_work(self, work_id: str) -> Task | None:
        return self._by_work.get(work_id)

    def newest(self, request_id: str) -> Task | None:
        """The newest attempt of a request."""
        return self._by_request.get(request_id)

    def count(self, status: Status) -> int:
        return self._counts[status]

    # -- moves -----------------------------------------------------------------------------------------------------

    def add(self, task: Task) -> None:
        """Know a task that is newer than any other of its request."""
        self._by_seq[task.seq] = self._by_work[task.work_id] = self._by_request[task.request.request_id] = task
        self._counts[task.status] += 1

    def move(self, task: Task, status: Status) -> None:
        self._counts[task.status] -= 1
        self._counts[status] += 1
        task.status = status

    def remove(self, task: Task) -> None:
        self._counts[task.status] -= 1
        del self._by_seq[task.seq]
        del self._by_work[task.work_id]
        request_id = task.request.request_id
        if self._by_request[request_id] is task:
            older = [other for other in self._by_seq.values() if other.request.request_id == request_id]
            if older:
                self._by_request[request_id] = max(older, key=lambda other: other.request.attempt)
            else:
                del self._by_request[request_id]

    def over(self, task: Task, event: Finished | Failed, now_s: float) -> Tell:
        """Remove a task and remember how it ended."""
        self.remove(task)
        self._ended.set(task.seq, event, now_s)
        return Tell(event)

    def ended(self, seq: int, now_s: float) -> Finished | Failed | None:
        """How a task ended a while ago; None if that is not known."""
        return self._ended.get(seq, now_s)

    # -- cancellation ----------------------------------------------------------------------------------------------

    def forbid(self, request_ids: Iterable[str], now_s: float) -> None:
        """Remember that these requests are not to be run."""
        for request_id in request_ids:
            self._cancelled.set(request_id, True, now_s)

    def forbidden(self, request_id: str, now_s: float) -> bool:
        return bool(self._cancelled.get(request_id, now_s))

    @staticmethod
    def cancel(tasks: Iterable[Task]) -> list[Action]:
        """Mark tasks as cancelled and take them out of the engine; one whose result is being recorded goes on."""
        work_ids = []
        for task in tasks:
            if not task.cancelled and task.status is not Status.ENDING:
                task.cancelled = True
                work_ids.append(task.work_id)
        return [Abort(work_ids)] if work_ids else []

    def check(self) -> None:
        """Assert that the indices agree with each other."""
        tasks = list(self._by_seq.values())
        assert all(task.seq == seq for seq, task in self._by_seq.items())
        assert {task.work_id for task in tasks} == set(self._by_work)
        assert {task.request.request_id for task in tasks} == set(self._by_request)
        for status in Status:
            assert self._counts[status] == sum(task.status is status for task in tasks)
        assert all((task.handed_off is not None) == (task.status is Status.HELD) for task in tasks)
