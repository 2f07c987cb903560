"""What each worker could reuse of a prompt, and what it would still have to do. No I/O.

Members tell what they hold in numbered messages (``KvEvents``) and show the last number in every heartbeat, so that a
message that was lost, or one from before this router listened, is noticed: the member is then asked for a snapshot.
What is known of a member goes when the member goes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from llmserve.bus.block_hashes import unpack_short
from llmserve.bus.flow.credits import WorkerState
from llmserve.bus.flow.prefix import Prefix
from llmserve.bus.flow.prefix_index import PrefixIndex, Reader, Run, Source
from llmserve.bus.messages import Heartbeat, KvChange, KvEvents, Tier

ASK_EVERY_S = 1.0
"""Between two requests for a snapshot to one member."""
LOAD_COST = {Tier.GPU: 0.0, Tier.DRAM: 0.05, Tier.NVME: 0.35, Tier.S3: 0.6}
"""Time to load a token over the time to compute it, as long as a worker has not measured its own."""


class Reuse(msgspec.Struct, frozen=True):
    """What one worker can do for one prompt."""

    tokens: dict[Tier, int]
    """Reused, by where they come from."""
    work_tokens: float
    """Tokens to compute, and those to load at what loading costs against computing."""

    @property
    def cached_tokens(self) -> int:
        return sum(self.tokens.values())


@dataclass(slots=True)
class LocalityStats:
    """Plain counts, for metrics and tests."""

    hits: int = 0
    """Grants of prompts of which the worker holds a part."""
    misses: int = 0
    reused_tokens: dict[Tier, int] = field(default_factory=lambda: dict.fromkeys(Tier, 0))
    """As expected at the grant, by source."""
    computed_tokens: int = 0
    """The rest of the granted prompts."""
    events: int = 0
    lost: int = 0
    """Messages that never came."""
    asked: int = 0
    """Snapshots asked for."""
    snapshots: int = 0
    """Snapshots received."""
    malformed: int = 0


@dataclass(slots=True)
class _Feed:
    """How far one member has been heard."""

    heard_s: float
    seq: int = 0
    asked_s: float = float("-inf")


class Locality:
    """The prefix index and the members that fill it."""

    def __init__(self, max_blocks: int) -> None:
        self.index = PrefixIndex(max_blocks)
        self.stats = LocalityStats()
        self._feeds: dict[str, _Feed] = {}
        self._stale: dict[str, None] = {}
        """Members of whose messages some are missing."""
        self._readers: dict[str, Reader] = {}

    # -- what members tell ----------------------------------------------------------------------------------------

    def hear(self, event: KvEvents, now_s: float) -> None:
        """Take in what a member says it holds."""
        feed = self._feeds.setdefault(event.member, _Feed(now_s))
        feed.heard_s = now_s
        self.stats.events += 1
        if event.snapshot:
            self._drop(event.member)
            self.stats.snapshots += 1
            self._stale.pop(event.member, None)
        elif event.seq <= feed.seq:
            return
        elif event.seq > feed.seq + 1:
            self.stats.lost += event.seq - feed.seq - 1 if feed.seq else 0
            self._stale[event.member] = None
        feed.seq = event.seq
        for change in event.changes:
            self._apply(event, change)

    def beat(self, beat: Heartbeat, now_s: float) -> None:
        """A heartbeat of any member: alive, leaving, or ahead of what was heard."""
        if beat.leaving:
            self.forget(beat.member)
            return
        if not beat.kv_seq:
            return
        feed = self._feeds.setdefault(beat.member, _Feed(now_s))
        feed.heard_s = now_s
        if beat.kv_seq > feed.seq:
            # A member's messages come in the order in which it sent them, so what is missing now never comes.
            self.stats.lost += beat.kv_seq - feed.seq if feed.seq else 0
            feed.seq = beat.kv_seq
            self._stale[beat.member] = None

    def forget(self, member: str) -> None:
        """The member is gone, and its pages with it."""
        self._drop(member)
        self._feeds.pop(member, None)
        self._stale.pop(member, None)
        self._readers.pop(member, None)

    def expire(self, silent_since_s: float) -> None:
        """Forget members that have not been heard since then."""
        for member in [name for name, feed in self._feeds.items() if feed.heard_s < silent_since_s]:
            self.forget(member)

    def due(self, now_s: float) -> list[str]:
        """Members to be asked for a snapshot now; each at most once in ``ASK_EVERY_S``."""
        members = [name for name in self._stale if now_s - self._feeds[name].asked_s >= ASK_EVERY_S]
        for name in members:
            self._feeds[name].asked_s = now_s
        self.stats.asked += len(members)
        return members

    def _apply(self, event: KvEvents, change: KvChange) -> None:
        source = Source(event.member, change.tier, event.fingerprint, event.block_tokens, event.host)
        if change.cleared:
            self.index.drop(source)
        try:
            self.index.remove(source, unpack_short(change.removed))
            if change.stored:
                self.index.store(source, unpack_short(change.stored))
        except ValueError:
            self.stats.malformed += 1

    def _drop(self, member: str) -> None:
        for source in self.index.sources(member):
            self.index.drop(source)

    # -- what a placement asks ------------------------------------------------------------------------------------

    def reuse(self, prefix: Prefix | None, prompt_tokens: int, worker: WorkerState) -> Reuse:
        """What ``worker`` would reuse and do for a prompt of so many tokens."""
        if prefix is None or prefix.block_tokens != worker.beat.page_tokens:
            return Reuse({}, prompt_tokens)
        blocks = self.index.loadable(self._runs(prefix), self._reader(worker))
        # Of two requests with one prefix that come together, the second finds what the first one computes.
        coming = max((prefix.common_blocks(other) for other in worker.prefixes_like(prefix)), default=0)
        if coming > blocks.get(Tier.GPU, 0):
            blocks = _behind(coming, blocks)
        # The last token is computed whatever is cached: the first output token is sampled from it.
        room = (prompt_tokens - 1) // prefix.block_tokens
        tokens: dict[Tier, int] = {}
        work_tokens = float(prompt_tokens)
        for tier, count in blocks.items():
            taken = min(count, room)
            room -= taken
            if taken:
                tokens[tier] = taken * prefix.block_tokens
                work_tokens -= tokens[tier] * (1.0 - load_cost(tier, worker.beat))
        return Reuse(tokens, work_tokens)

    def granted(self, reuse: Reuse, prompt_tokens: int) -> None:
        """Count what a grant is expected to reuse."""
        cached_tokens = reuse.cached_tokens
        if cached_tokens:
            self.stats.hits += 1
        else:
            self.stats.misses += 1
        for tier, tokens in reuse.tokens.items():
            self.stats.reused_tokens[tier] += tokens
        self.stats.computed_tokens += prompt_tokens - cached_tokens

    def summary(self) -> str:
        """What is known and what came of it, for people."""
        stats = self.stats
        prompts = stats.hits + stats.misses
        return (
            f"{len(self.index)} blocks known{_by_tier(self.index.sizes())}; "
            f"{stats.hits} of {prompts} prompts placed at pages of theirs, "
            f"{sum(stats.reused_tokens.values())} tokens{_by_tier(stats.reused_tokens)}"
        )

    def _runs(self, prefix: Prefix) -> tuple[Run, ...]:
        if prefix.version != self.index.version:
            prefix.runs = self.index.runs(unpack_short(prefix.data))
            prefix.version = self.index.version
        return prefix.runs

    def _reader(self, worker: WorkerState) -> Reader:
        reader = self._readers.get(worker.member)
        if reader is None:
            beat = worker.beat
            reader = self._readers[worker.member] = Reader(
                worker.member, beat.fingerprint, beat.page_tokens, beat.host
            )
        return reader


def _behind(coming: int, blocks: dict[Tier, int]) -> dict[Tier, int]:
    """``blocks`` of a prefix of which the first ``coming`` are in the engine's own memory."""
    found = {Tier.GPU: coming}
    for tier, count in blocks.items():
        taken = min(coming, count)
        coming -= taken
        if tier is not Tier.GPU and count > taken:
            found[tier] = count - taken
    return found


def _by_tier(numbers: dict[Tier, int]) -> str:
    said = ", ".join(f"{number} {tier.value}" for tier, number in numbers.items() if number)
    return f" ({said})" if said else ""


def load_cost(tier: Tier, beat: Heartbeat) -> float:
    """Time that the worker of ``beat`` takes to load a token over its time to compute one, at most 1: what loads
    slower than it computes is not worth loading."""
    if tier is Tier.GPU:
        return 0.0
    loaded_s, computed_s = beat.load_tokens_s.get(tier, 0.0), beat.prefill_tokens_s
    if loaded_s > 0 and computed_s > 0:
        return min(1.0, computed_s / loaded_s)
    return LOAD_COST[tier]
