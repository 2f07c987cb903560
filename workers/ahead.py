"""Prompts whose first pages are fetched here while another worker still computes the rest. Only hints: nothing of it
is confirmed, and a request that is granted later runs whether they came or not."""

from __future__ import annotations

from dataclasses import dataclass

from llmserve.bus.base import StoredRequest
from llmserve.bus.cache_salt import CacheSalts
from llmserve.bus.messages import Grant, MessageError, Prefilling, Request, Stage, decode
from llmserve.workers.actions import Abort, Action, Fetch, FetchAhead
from llmserve.workers.engine.base import Work
from llmserve.workers.recent import Recent


@dataclass(slots=True)
class _Prompt:
    tenant: str
    newest: Grant
    request: Request | None = None
    """None while it is being fetched."""


@dataclass(slots=True)
class _Fetched:
    tenant: str
    moved_bytes: int = 0


class Aheads:
    """What is, or was of late, fetched ahead, by sequence of the request."""

    def __init__(self, stage: Stage, remember_s: float, salts: CacheSalts) -> None:
        self._stage = stage
        self._salts = salts
        self._prompts: Recent[int, _Prompt] = Recent(remember_s)
        self._fetched: Recent[str, _Fetched] = Recent(remember_s)
        """By work id."""
        self._cancelled: Recent[str, bool] = Recent(remember_s)

    def granted(self, grant: Grant, now_s: float) -> list[Action]:
        """Pages are on offer; the router has set room aside for the request."""
        if self._stage is not Stage.DECODE:
            return []
        prompt = self._prompts.get(grant.seq, now_s)
        if prompt is not None:
            prompt.newest = grant
            return self._fetch(prompt, now_s)
        self._prompts.set(grant.seq, prompt := _Prompt(grant.tenant, grant), now_s)
        if not grant.request:
            return [Fetch(grant)]
        try:
            request = decode(grant.request)
        except MessageError:
            # The request's own grant comes with the same bytes and is refused.
            return []
        prompt.request = request if isinstance(request, Request) else None
        return self._fetch(prompt, now_s)

    def fetched(self, grant: Grant, stored: StoredRequest | None, now_s: float) -> list[Action]:
        """The request of an offer that came without it; None if it is over."""
        prompt = self._prompts.get(grant.seq, now_s)
        if prompt is None or stored is None:
            return []
        prompt.request = stored.request
        return self._fetch(prompt, now_s)

    def _fetch(self, prompt: _Prompt, now_s: float) -> list[Action]:
        request, grant = prompt.request, prompt.newest
        if request is None or self._cancelled.get(request.request_id, now_s):
            return []
        try:
            offer = decode(grant.handoff)
        except MessageError:
            return []
        if not isinstance(offer, Prefilling):
            return []
        work_id = f"{request.request_id}.{request.attempt}"
        self._fetched.set(work_id, self._fetched.get(work_id, now_s) or _Fetched(grant.tenant), now_s)
        work = Work(
            work_id=work_id,
            stage=Stage.DECODE,
            body=request.body,
            handoff=offer.params,
            tenant=grant.tenant,
            owner_salt=self._salts.owner(grant.tenant),
            ahead=True,
        )
        return [FetchAhead(work)]

    def request(self, seq: int, now_s: float) -> Request | None:
        """The request, if it has been here ahead of its grant."""
        prompt = self._prompts.get(seq, now_s)
        return prompt.request if prompt is not None else None

    def tenant_of(self, work_id: str, now_s: float) -> str:
        """Whose prompt it is; empty if it is not known any more."""
        fetched = self._fetched.get(work_id, now_s)
        return fetched.tenant if fetched is not None else ""

    def moved(self, work_id: str, moved_bytes: int, now_s: float) -> None:
        """Pages of it have come."""
        if (fetched := self._fetched.get(work_id, now_s)) is not None:
            fetched.moved_bytes += moved_bytes

    def moved_bytes(self, work_id: str, now_s: float) -> int:
        """Bytes of its pages that have come so far."""
        fetched = self._fetched.get(work_id, now_s)
        return fetched.moved_bytes if fetched is not None else 0

    def cancel(self, request_ids: set[str], now_s: float, *, for_good: bool) -> list[Action]:
        """Nobody wants these any more; ``for_good``: nor any later attempt of them."""
        for request_id in request_ids if for_good else ():
            self._cancelled.set(request_id, True, now_s)
        work_ids = [work_id for work_id in self._fetched if work_id.rpartition(".")[0] in request_ids]
        return [Abort(work_ids)] if work_ids else []
