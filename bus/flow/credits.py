"""What a worker can take, from its heartbeats and from what was sent to it since."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice

from llmserve.bus.flow.entry import Entry
from llmserve.bus.flow.prefix import Prefix
from llmserve.bus.messages import Heartbeat, Role, Running, Stage

STAGE_OF_ROLE = {Role.PREFILL: Stage.PREFILL, Role.DECODE: Stage.DECODE, Role.BOTH: Stage.WHOLE}

ALIKE = 8
"""Requests of one worker that a new one's prefix is compared with."""


@dataclass(frozen=True, slots=True)
class Stray:
    """What a worker runs though its book does not have it: an attempt given up, or not seen on the stream yet."""

    tenant: str
    stage: Stage
    prompt_tokens: int
    bound_tokens: int
    pages: int
    listed: bool
    """The worker counts it in its free pages."""


class WorkerState:
    """The router's ledger of one worker. Each heartbeat corrects it, so that it cannot drift."""

    def __init__(self, beat: Heartbeat, now_s: float) -> None:
        self.member = beat.member
        self.stage = STAGE_OF_ROLE[beat.role]
        self.beat = beat
        self.last_beat_s = now_s
        self.book: dict[int, Entry] = {}
        """Granted to it or running there, by sequence."""
        self.holding: dict[int, Entry] = {}
        """Handed off by it and waiting for a decode worker."""
        self.work_tokens = 0
        """Prompt tokens to compute of the book's requests."""
        self._prefixes: dict[bytes, dict[int, Prefix]] = {}
        """Of the book's requests, by head."""
        self.pages = 0
        """Set aside for the book's requests."""
        self.unlisted_pages = 0
        """Of those, for requests that ``beat`` cannot have counted in its free pages."""
        self.batch = 0
        """Of the book's requests, those of class batch."""
        self.held_pages = 0
        """Of ``holding``."""
        self.reserved: dict[int, int] = {}
        """Pages set aside, by sequence, for requests that another worker prefills and whose pages come ahead."""
        self.reserved_pages = 0
        self.strays: dict[int, Stray] = {}
        """What it runs besides the book, by sequence."""
        self.stray_prompt_tokens = 0
        self.stray_pages = 0
        self.stray_unlisted_pages = 0
        self.holds = False
        """Whether its last inventory lists pages held for a handoff."""
        self.inventory = {line.seq: line for line in beat.running}
        self.claims: dict[int, Running] = {}
        """Lines of its last inventory about requests that are not known from the stream yet."""
        self.muted = False
        """Refused or unreachable: no grants until its next heartbeat."""
        self.gone = False

    @property
    def open(self) -> bool:
        """Whether it may get grants at all."""
        return not (self.gone or self.muted or self.beat.draining)

    @property
    def alone(self) -> bool:
        """Whether a request would have the worker for itself."""
        return not (self.book or self.strays or self.reserved)

    @property
    def free_pages(self) -> int:
        """Pages neither used nor set aside, by the more careful of the worker's count and ours."""
        return min(
            self.beat.pages_total - self.pages - self.stray_pages - self.held_pages - self.reserved_pages,
            self.beat.pages_free - self.unlisted_pages - self.stray_unlisted_pages - self.reserved_pages,
        )

    @property
    def pages_in_use(self) -> int:
        """Used or set aside, by the more careful of the two counts."""
        return self.beat.pages_total - self.free_pages if self.beat.pages_total else 0

    def has_batch_slot(self, min_decode_slots: int) -> bool:
        """Whether one more request of class batch leaves the slots that are not for it. Strays may be batch."""
        if self.stage is Stage.PREFILL:
            return True
        return self.batch + len(self.strays) + len(self.reserved) < self.beat.slots - min_decode_slots

    def pages_for(self, prompt_tokens: int, max_tokens: int, reserved_output_tokens: int) -> int:
        """Pages that a request of that size is going to need here."""
        output = 1 if self.stage is Stage.PREFILL else min(max_tokens, reserved_output_tokens)
        return self._pages_of(prompt_tokens + output)

    def pages_to_decode(self, prompt_tokens: int, max_tokens: int, reserved_output_tokens: int) -> int:
        """Pages that a request of that size is going to need at a decode worker, whose pages are like those here."""
        return self._pages_of(prompt_tokens + min(max_tokens, reserved_output_tokens))

    def _pages_of(self, tokens: int) -> int:
        if not self.beat.pages_total or not self.beat.page_tokens:
            return 0
        return min(-(-tokens // self.beat.page_tokens), self.beat.pages_total)

    def has_room(self) -> bool:
        """Whether some request, however small, fits now."""
        beat, busy = self.beat, len(self.book) + len(self.strays) + len(self.reserved)
        if busy >= beat.slots or not self.open:
            return False
        if not busy and not self.holds:
            return True
        if busy and self.stage is Stage.PREFILL and self.outstanding_tokens >= beat.prefill_tokens:
            return False
        return not beat.pages_total or self.free_pages > 0

    @property
    def outstanding_tokens(self) -> int:
        """Prompt tokens that it has to compute, or may have to."""
        return self.work_tokens + self.stray_prompt_tokens

    def fits(self, entry: Entry, reserved_output_tokens: int, work: Callable[[Entry, WorkerState], int]) -> bool:
        """Whether the request fits into the credit of a worker that has room.

        ``work``: prompt tokens that it would compute here. What it does not compute takes no credit, and a request
        whose prefix is here may overdraw it as long as it would wait and compute less than the whole prompt.
        """
        if entry.is_suspect and any(other.is_suspect for other in self.book.values()):
            return False
        if self.stage is Stage.PREFILL and not self.alone:
            left_tokens = self.beat.prefill_tokens - self.outstanding_tokens
            if entry.prompt_tokens > left_tokens:
                work_tokens = work(entry, self)
                if work_tokens > left_tokens and self.outstanding_tokens + work_tokens > entry.prompt_tokens:
                    return False
        if self.alone and not self.holds:
            return True
        return self.free_pages >= self.pages_for(entry.prompt_tokens, entry.max_tokens, reserved_output_tokens)

    def serves(self, entry: Entry) -> bool:
        """Whether the request fits into the model's context here."""
        return not self.beat.max_model_len or entry.prompt_tokens < self.beat.max_model_len

    def load(self) -> float:
        """How busy it is, 0 to about 1; comparable between workers that could take the same request."""
        if self.stage is Stage.PREFILL:
            return self.outstanding_tokens / max(1, self.beat.prefill_tokens)
        if self.beat.pages_total:
            return 1.0 - self.free_pages / self.beat.pages_total
        return (len(self.book) + len(self.strays)) / max(1, self.beat.slots)

    def take(self, entry: Entry, pages: int) -> None:
        """Enter the request into the book."""
        entry.worker, entry.pages, entry.listed = self, pages, False
        self.book[entry.seq] = entry
        self.work_tokens += entry.work_tokens
        if entry.prefix is not None:
            self._prefixes.setdefault(entry.prefix.head, {})[entry.seq] = entry.prefix
        self.batch += entry.is_batch
        self.pages += pages
        self.unlisted_pages += pages

    def release(self, entry: Entry) -> None:
        """Strike the request from the book."""
        del self.book[entry.seq]
        self.work_tokens -= entry.work_tokens
        if entry.prefix is not None:
            alike = self._prefixes[entry.prefix.head]
            del alike[entry.seq]
            if not alike:
                del self._prefixes[entry.prefix.head]
        self.batch -= entry.is_batch
        self.pages -= entry.pages
        if entry.ahead is not None:
            entry.ahead.unreserve(entry)
        if not entry.listed:
            self.unlisted_pages -= entry.pages
        entry.worker = None

    def reserve(self, entry: Entry, pages: int) -> None:
        """Set a slot and pages aside until the worker that prefills the request is done with it."""
        entry.ahead = self
        self.reserved[entry.seq] = pages
        self.reserved_pages += pages

    def unreserve(self, entry: Entry) -> None:
        self.reserved_pages -= self.reserved.pop(entry.seq, 0)

    def prefixes_like(self, prefix: Prefix) -> Iterable[Prefix]:
        """Prefixes of the book's latest requests that begin as ``prefix`` does."""
        return islice(reversed(self._prefixes.get(prefix.head, {}).values()), ALIKE)

    def hold(self, entry: Entry, pages: int) -> None:
        """Keep the pages of a handoff that waits for a decode worker."""
        self.holding[entry.seq], entry.pages = entry, pages
        self.held_pages += pages

    def let_go(self, entry: Entry) -> None:
        """The handoff waits no more."""
        del self.holding[entry.seq]
        self.held_pages -= entry.pages

    def hear(self, beat: Heartbeat, now_s: float) -> None:
        """Adopt a heartbeat with its credit and its inventory."""
        self.beat = beat
        self.last_beat_s = now_s
        self.muted = False
        self.inventory = {line.seq: line for line in beat.running}
        self.holds = any(line.held for line in beat.running)
        for entry in self.book.values():
            if not entry.listed and entry.seq in self.inventory:
                entry.listed = True
                self.unlisted_pages -= entry.pages

    def listed_strays(self, reserved_output_tokens: int) -> dict[int, Stray]:
        """What its last inventory shows besides the book."""
        strays = {}
        for seq, line in self.inventory.items():
            if not line.held and seq not in self.book:
                pages = self.pages_for(line.prompt_tokens, line.max_tokens, reserved_output_tokens)
                bound_tokens = line.prompt_tokens + line.max_tokens
                strays[seq] = Stray(line.tenant, line.stage, line.prompt_tokens, bound_tokens, pages, True)
        return strays

    def add_stray(self, seq: int, stray: Stray) -> None:
        self.strays[seq] = stray
        self.stray_prompt_tokens += stray.prompt_tokens
        self.stray_pages += stray.pages
        if not stray.listed:
            self.stray_unlisted_pages += stray.pages

    def remove_stray(self, seq: int) -> Stray:
        stray = self.strays.pop(seq)
        self.stray_prompt_tokens -= stray.prompt_tokens
        self.stray_pages -= stray.pages
        if not stray.listed:
            self.stray_unlisted_pages -= stray.pages
        return stray

    def check(self) -> None:
        """Assert the invariants."""
        entries = self.book.values()
        assert self.work_tokens == sum(entry.work_tokens for entry in entries), f"{self.member}: tokens to compute"
        named = {entry.seq for entry in entries if entry.prefix is not None}
        assert named == {seq for alike in self._prefixes.values() for seq in alike}, f"{self.member}: prefixes"
        assert self.pages == sum(entry.pages for entry in entries), f"{self.member}: pages"
        unlisted = sum(entry.pages for entry in entries if not entry.listed)
        assert self.unlisted_pages == unlisted, f"{self.member}: unlisted pages"
        assert min(self.work_tokens, self.pages, self.unlisted_pages) >= 0, f"{self.member}: negative"
        assert self.batch == sum(entry.is_batch for entry in entries), f"{self.member}: batch requests"
        assert self.reserved_pages == sum(self.reserved.values()), f"{self.member}: reserved pages"
        held = sum(entry.pages for entry in self.holding.values())
        assert self.held_pages == held, f"{self.member}: held pages"
        strays = self.strays.values()
        assert self.stray_prompt_tokens == sum(s.prompt_tokens for s in strays), f"{self.member}: strays' tokens"
        assert self.stray_pages == sum(s.pages for s in strays), f"{self.member}: strays' pages"
        unlisted = sum(s.pages for s in strays if not s.listed)
        assert self.stray_unlisted_pages == unlisted, f"{self.member}: strays' unlisted pages"
        assert not self.strays.keys() & self.book.keys(), f"{self.member}: a stray is in the book"
        assert all(entry.worker is self for entry in entries), f"{self.member}: books another's request"
        assert all(entry.holder is self for entry in self.holding.values()), f"{self.member}: holds another's pages"
