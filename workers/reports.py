"""The messages by which a worker reports on its tasks."""

from __future__ import annotations

from dataclasses import dataclass

from msgspec.structs import replace

from llmserve.bus.messages import (
    Accepted,
    Failed,
    Finished,
    Grant,
    HandedOff,
    Prefilling,
    Reason,
    Refused,
    Result,
    Role,
    Stage,
)
from llmserve.workers.actions import Action, Task, Tell
from llmserve.workers.engine.base import EngineOutput, Offer


@dataclass(frozen=True, slots=True)
class Identity:
    """What a worker says of itself in every heartbeat."""

    member: str
    role: Role
    host: str = ""
    pid: int = 0
    metrics_port: int = 0


class Reports:
    """Messages of one worker.

    ``Finished`` counts the tokens of its attempt, in whose prompt those of earlier attempts stand; ``Result`` counts
    those of the whole request.
    """

    def __init__(self, member: str) -> None:
        self._member = member

    def accepted(self, grant: Grant) -> Tell:
        return Tell(
            Accepted(worker=self._member, seq=grant.seq, attempt=grant.attempt, stage=grant.stage, epoch=grant.epoch)
        )

    def refused(self, grant: Grant, reason: str, *, retry: bool = True) -> Tell:
        return Tell(
            Refused(
                worker=self._member,
                seq=grant.seq,
                attempt=grant.attempt,
                stage=grant.stage,
                reason=reason,
                retry=retry,
                epoch=grant.epoch,
            )
        )

    def not_run(self, grant: Grant, request_id: str) -> Tell:
        """A grant of a request that nobody wants any more."""
        return Tell(
            Finished(
                worker=self._member,
                seq=grant.seq,
                request_id=request_id,
                attempt=grant.attempt,
                stage=grant.stage,
                reason=Reason.CANCELLED,
            )
        )

    def finished(self, task: Task, reason: Reason) -> Finished:
        request = task.request
        return Finished(
            worker=self._member,
            seq=task.seq,
            request_id=request.request_id,
            attempt=request.attempt,
            stage=task.stage,
            reason=reason,
            prompt_tokens=request.prompt_tokens,
            output_tokens=task.sent,
            cached_tokens=task.cached_tokens,
            moved_bytes=task.moved_bytes,
        )

    def failed(self, task: Task, error: str, *, died: bool = False) -> Failed:
        request = task.request
        return Failed(
            worker=self._member,
            seq=task.seq,
            request_id=request.request_id,
            attempt=request.attempt,
            stage=task.stage,
            error=error,
            died=died,
        )

    def result(self, task: Task, reason: Reason) -> Result:
        request = task.request
        return Result(
            request_id=request.request_id,
            attempt=request.attempt,
            worker=self._member,
            reason=reason,
            prompt_tokens=request.prompt_tokens - request.offset,
            output_tokens=request.offset + task.sent,
            cached_tokens=task.cached_tokens,
        )

    def handed_off(self, task: Task, output: EngineOutput, page_bytes: int, lease_s: float) -> HandedOff:
        request = task.request
        return HandedOff(
            worker=self._member,
            seq=task.seq,
            request_id=request.request_id,
            attempt=request.attempt,
            tokens=[] if request.whole_output else output.tokens,
            pages=output.pages,
            page_bytes=page_bytes,
            lease_s=lease_s,
            params=output.handoff,
        )

    def prefilling(self, task: Task, offer: Offer) -> Prefilling:
        return Prefilling(
            worker=self._member,
            seq=task.seq,
            request_id=task.request.request_id,
            attempt=task.request.attempt,
            params=offer.handoff,
        )

    @staticmethod
    def handed_off_again(task: Task, now_s: float) -> list[Action]:
        """The handoff of a task with what is left of its lease, if there is any."""
        left_s = task.lease_until_s - now_s
        if task.handed_off is None or left_s <= 0:
            return []
        return [Tell(replace(task.handed_off, lease_s=left_s))]


def stage_of(role: Role) -> Stage:
    """The stage that workers of a role run. Raises ``KeyError`` for other members."""
    return {Role.PREFILL: Stage.PREFILL, Role.DECODE: Stage.DECODE, Role.BOTH: Stage.WHOLE}[role]
