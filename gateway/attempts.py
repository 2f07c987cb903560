"""One request from its first attempt to its end: which tokens reach the client, and when to try again.

A pure state machine: events go in as method calls, what is to be done comes out as actions. Tokens travel at most
once and workers die, so deltas are lost, repeated, or belong to an attempt that was given up. Whatever happens, the
tokens delivered are those of one run of the model, each once, or the request ends in one ``Fail``.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from llmserve.bus.messages import Reason

MAX_ATTEMPTS = 5
"""Deaths of workers are counted by the router: what kills two of them is not tried so often."""


class Mode(enum.Enum):
    """What a new attempt can do with the tokens that were delivered already."""

    RESUME = "resume"
    """Continue behind them: each token depends on the tokens before it and on nothing else."""
    REPLAY = "replay"
    """Start over and yield the same tokens again: sampling holds state, but is deterministic."""
    ONCE = "once"
    """Nothing: sampling is random and holds state. Only a request without tokens can be tried again."""


@dataclass(frozen=True, slots=True)
class Submit:
    """Store attempt ``attempt``, which starts behind the first ``offset`` output tokens."""

    attempt: int
    offset: int


@dataclass(frozen=True, slots=True)
class Deliver:
    """Pass the delta on, without its first ``skip`` tokens."""

    skip: int
    reason: Reason | None


@dataclass(frozen=True, slots=True)
class Discard:
    """Take a superseded attempt off the stream."""

    seq: int


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Tell everyone to stop, and take the request off the stream if ``seq`` is known."""

    seq: int | None


@dataclass(frozen=True, slots=True)
class Fail:
    """The request ends in an error. ``code`` is the router's (see ``Rejected``), ``cancelled`` or ``internal``."""

    code: str
    message: str


Action: TypeAlias = Submit | Deliver | Discard | Withdraw | Fail


class Attempts:
    """The attempts of one request.

    ``max_tokens`` bounds the whole output. The caller stores an attempt for each ``Submit`` and reports ``stored`` or
    ``unstorable``; once ``ended`` is true nothing but ``Discard`` comes out.
    """

    def __init__(self, mode: Mode, max_tokens: int, max_attempts: int = MAX_ATTEMPTS) -> None:
        self.mode = mode
        self.max_tokens = max_tokens
        self.max_attempts = max_attempts
        self.attempt = 0
        self._tries = 1
        """Attempts that count: those that were lost while they waited do not."""
        self.tokens: list[int] = []
        """All output delivered so far."""
        self.seq: int | None = None
        """Of the newest attempt that is stored."""
        self.ended = False
        self._stored_attempt = -1
        self._next = 0
        """Offset that the current attempt's next delta has if nothing was lost."""

    @property
    def stored_seq(self) -> int | None:
        """Of the current attempt; None until it is stored: ``seq`` may still be that of one before it, which says
        nothing about this one."""
        return self.seq if self._stored_attempt == self.attempt else None

    def start(self) -> Submit:
        """The first attempt."""
        return Submit(0, 0)

    def stored(self, attempt: int, seq: int) -> list[Action]:
        """The stream acknowledged ``attempt``."""
        if self.ended or attempt < self._stored_attempt:
            return [Discard(seq)]
        superseded = self.seq
        self.seq, self._stored_attempt = seq, attempt
        return [] if superseded is None else [Discard(superseded)]

    def unstorable(self, attempt: int, cause: str) -> list[Action]:
        """The stream did not take ``attempt``."""
        if self.ended or attempt != self.attempt:
            return []
        return self._fail("internal", f"could not be queued again: {cause}")

    def delta(self, attempt: int, offset: int, tokens: Sequence[int], reason: Reason | None) -> list[Action]:
        """Tokens ``offset`` to ``offset + len(tokens)`` of the whole output, from one engine step."""
        if self.ended or attempt != self.attempt:
            return []
        if offset > self._next:
            return self._again(f"tokens {self._next} to {offset} were lost")
        end = offset + len(tokens)
        known = self.tokens[offset:end]
        if known and list(tokens[: len(known)]) != known:
            return self._differs(f"token {offset} and on differ from what attempt {attempt} repeats")
        if reason is Reason.ERROR:
            return self._again("the worker reports an error")
        if reason is Reason.CANCELLED:
            return self._fail("cancelled", "the deployment cancelled the request; it may be sent again")
        if reason is not None and end < len(self.tokens):
            return self._differs(f"attempt {attempt} ends after {end} tokens, {len(self.tokens)} were delivered")
        self._next = max(self._next, end)
        self.tokens.extend(tokens[len(known) :])
        if reason is None and len(known) == len(tokens):
            return []
        self.ended = reason is not None
        return [Deliver(len(known), reason)]

    def lost(self, attempt: int, cause: str, *, blameless: bool = False) -> list[Action]:
        """``attempt`` will yield nothing more. ``blameless``: not by anything that was tried with it."""
        return [] if self.ended or attempt != self.attempt else self._again(cause, blameless=blameless)

    def rejected(self, attempt: int, code: str, message: str) -> list[Action]:
        """The router will not serve ``attempt``."""
        return [] if self.ended or attempt != self.attempt else self._fail(code, message)

    def expired(self, deadline_s: float) -> list[Action]:
        """No token came for ``deadline_s`` seconds."""
        return [] if self.ended else self._fail("deadline", f"no token for {deadline_s:g} s")

    def cancel(self) -> list[Action]:
        """The client is gone, or has what it needs."""
        if self.ended:
            return []
        self.ended = True
        return [Withdraw(self.seq)]

    def check(self) -> None:
        """Assert the invariants."""
        assert 1 <= self._tries <= self.max_attempts
        assert self._tries <= self.attempt + 1
        assert self._stored_attempt <= self.attempt
        assert self._next <= len(self.tokens)
        assert self.ended or self.mode is not Mode.RESUME or self._next == len(self.tokens)

    def _again(self, cause: str, *, blameless: bool = False) -> list[Action]:
        if not blameless and self._tries >= self.max_attempts:
            return self._fail("internal", f"gave up after {self.max_attempts} attempts; the last: {cause}")
        if self.tokens and self.mode is Mode.ONCE:
            return self._fail("internal", f"cannot be continued, since its sampling is random and has state: {cause}")
        if self.mode is Mode.RESUME and len(self.tokens) >= self.max_tokens:
            self.ended = True
            return [Deliver(0, Reason.LENGTH), Withdraw(self.seq)]
        self.attempt += 1
        self._tries += not blameless
        self._next = len(self.tokens) if self.mode is Mode.RESUME else 0
        return [Submit(self.attempt, self._next)]

    def _differs(self, what: str) -> list[Action]:
        """Two runs got mixed up. Where tokens can be continued, a new attempt shuts both out."""
        if self.mode is Mode.RESUME:
            return self._again(what)
        return self._fail("internal", f"a second run differs from the first: {what}")

    def _fail(self, code: str, message: str) -> list[Action]:
        self.ended = True
        return [Fail(code, message), Withdraw(self.seq)]
