"""Continuous batching over paged memory, simulated: which sequence computes how many tokens in the next step.

The policy is vLLM's in outline: running sequences first, in order of arrival, each with what it still has to
compute, then waiting ones while slots, pages and the step's token budget last; when a running sequence cannot grow,
the newest one gives up its pages and computes again later what is not in the prefix cache then. No I/O, no clock.
"""

from __future__ import annotations

from collections import deque

from llmserve.bus.messages import Reason, Stage
from llmserve.workers.engine.base import EngineError, EngineOutput
from llmserve.workers.engine.simulated_pages import PagePool
from llmserve.workers.engine.simulated_sequence import Batch, Limits, Names, Phase, Sequence, digest_of
from llmserve.workers.engine.wire import Body


class Scheduler:
    """All sequences of one engine and its page pool."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.pool = PagePool(limits.pages, limits.dram_pages)
        self.sequences: dict[str, Sequence] = {}
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.loading = 0
        self.preemptions = 0

    @property
    def pages_free(self) -> int:
        return self.pool.free

    def add(
        self,
        work_id: str,
        stage: Stage,
        body: Body,
        first_tokens: tuple[int, ...] = (),
        handoff: bytes = b"",
        cache_salt: str = "",
    ) -> None:
        """Queue a sequence. Raises ``EngineError`` if it can never run here."""
        limits, prompt = self.limits, len(body.prompt)
        if work_id in self.sequences:
            raise EngineError(f"work {work_id} is already here")
        room = limits.max_model_len - prompt
        if room < 1:
            raise EngineError(f"prompt of {prompt} tokens, the model takes {limits.max_model_len - 1} at most")
        limit = min(room, body.max_tokens if body.max_tokens is not None else room)
        if limits.pages_for(prompt + limit) > limits.pages:
            raise EngineError(
                f"request of {prompt + limit} tokens needs {limits.pages_for(prompt + limit)} pages,"
                f" the engine has {limits.pages}"
            )
        tokens = [*body.prompt, *first_tokens]
        sequence = Sequence(
            work_id=work_id,
            stage=stage,
            prompt=prompt,
            limit=limit,
            min_tokens=body.min_tokens,
            stop_token_ids=body.stop_token_ids,
            digest=digest_of(tokens),
            generated=len(first_tokens),
            handoff=handoff,
        )
        if limits.prefix_cache:
            sequence.names = Names(cache_salt, limits.page_tokens)
            sequence.names.append(tokens)
        self.sequences[work_id] = sequence
        self.waiting.append(sequence)

    def schedule(self) -> Batch:
        """Plan a step and allocate its pages."""
        batch, budget = Batch(), self.limits.step_tokens
        index = 0
        preempted = False
        while index < len(self.running):
            sequence = self.running[index]
            tokens = self._chunk(sequence, budget, batch)
            if tokens and not self._grow(sequence, sequence.computed + tokens):
                # The newest sequence made room with its own pages, or was this one.
                preempted = True
                if sequence.phase is not Phase.RUNNING:
                    break
                continue
            index += 1
            if tokens:
                budget -= tokens
                self._put(batch, sequence, tokens)
        if not preempted:
            self._admit(batch, budget)
        return batch

    def complete(self, batch: Batch) -> list[EngineOutput]:
        """Carry the step out; prefill work that goes on elsewhere is ``HELD`` afterwards, its output not yielded
        here but by ``hand_off``."""
        outputs = []
        for sequence, tokens in batch.items:
            if sequence.phase is not Phase.RUNNING:
                continue
            sequence.computed += tokens
            self._name_pages(sequence)
            if sequence.computed == sequence.length:
                outputs.append(self._sample(sequence))
        if outputs:
            self.running = [sequence for sequence in self.running if sequence.phase is Phase.RUNNING]
        return outputs

    def loaded(self, sequence: Sequence, *, ok: bool, cached: int = 0) -> None:
        """The fetch of a sequence's pages ended; on failure it computes everything."""
        if sequence.phase is not Phase.LOADING:
            return
        self.loading -= 1
        sequence.phase = Phase.RUNNING
        sequence.handoff = b""
        if ok:
            # One token at least is computed here: it is the one that yields the next.
            sequence.computed = min(sequence.prompt, sequence.length - 1)
            sequence.cached = cached
            self._name_pages(sequence)
        elif sequence.names is not None:
            sequence.computed = len(sequence.names.shared) * self.limits.page_tokens
        self.running.append(sequence)

    def abort(self, work_id: str) -> Phase | None:
        """Drop a sequence and free its pages; returns the phase it was in, None if unknown."""
        sequence = self.sequences.get(work_id)
        if sequence is None:
            return None
        phase = sequence.phase
        if phase is Phase.WAITING:
            self.waiting.remove(sequence)
        elif phase is Phase.RUNNING:
            self.running.remove(sequence)
        elif phase is Phase.LOADING:
            self.loading -= 1
        self._drop(sequence)
        return phase

    def release(self, work_id: str) -> bool:
        """Free the pages of held work; False if it is not held."""
        sequence = self.sequences.get(work_id)
        if sequence is None or sequence.phase is not Phase.HELD:
            return False
        self._drop(sequence)
        return True

    def check(self) -> None:
        """Assert that every page has one owner and every sequence one place."""
        self.pool.check()
        shared = [s.names.shared for s in self.sequences.values() if s.names is not None]
        owned = sum(sequence.pages for sequence in self.sequences.values()) - sum(map(len, shared))
        names = {number for numbers in shared for number in numbers}
        assert self.pages_free >= 0
        assert self.pool.private == owned
        assert owned + len(names) + self.pages_free == self.limits.pages
        phases = [sequence.phase for sequence in self.sequences.values()]
        assert phases.count(Phase.RUNNING) == len(self.running) == len(set(self.running))
        assert phases.count(Phase.WAITING) == len(self.waiting)
        assert phases.count(Phase.LOADING) == self.loading
        assert len(self.running) + self.loading <= self.limits.slots
        assert Phase.GONE not in phases
        assert all(sequence.pages == 0 for sequence in self.waiting)
        for sequence in self.running:
            assert self.limits.pages_for(sequence.computed) <= sequence.pages
            assert sequence.computed < sequence.length

    def _chunk(self, sequence: Sequence, budget: int, batch: Batch) -> int:
        """Tokens that ``sequence`` computes in this step."""
        limits, pending = self.limits, sequence.length - sequence.computed
        if not limits.chunked:
            # A prompt longer than the budget has a step of its own.
            return pending if pending <= budget or not batch.items else 0
        if limits.long_prompt_tokens is not None and pending > limits.long_prompt_tokens:
            pending = limits.long_prompt_tokens
        return min(pending, budget)

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        """Give ``sequence`` pages for ``tokens``; else preempt the newest running one and return False."""
        missing = self.limits.pages_for(tokens) - sequence.pages
        if missing <= self.pages_free:
            if missing > 0:
                self.pool.take((), missing)
                sequence.pages += missing
            return True
        victim = self.running.pop()
        self._leave_pages(victim)
        victim.computed = 0
        victim.phase = Phase.WAITING
        self.waiting.appendleft(victim)
        self.preemptions += 1
        return False

    def _admit(self, batch: Batch, budget: int) -> None:
        limits = self.limits
        while self.waiting and len(self.running) + self.loading < limits.slots:
            sequence = self.waiting[0]
            found = self._find_pages(sequence)
            below = self._find_below(sequence, len(found))
            sequence.computed = (len(found) + below) * limits.page_tokens
            tokens = self._chunk(sequence, budget, batch)
            need = limits.pages_for(sequence.length)
            if not self.pool.can_take(found, need - len(found)) or not (tokens or sequence.handoff):
                sequence.computed = 0
                return
            self.waiting.popleft()
            self.pool.take(found, need - len(found))
            sequence.pages = need
            if sequence.names is not None:
                sequence.names.shared = found
                self._name_pages(sequence)
                batch.loaded_pages += below
            if not sequence.yielded and not sequence.handoff:
                sequence.cached = sequence.computed
                sequence.loaded = below * limits.page_tokens
            if sequence.handoff:
                sequence.phase = Phase.LOADING
                self.loading += 1
                batch.loads.append(sequence)
                continue
            sequence.phase = Phase.RUNNING
            self.running.append(sequence)
            budget -= tokens
            self._put(batch, sequence, tokens)

    def _find_pages(self, sequence: Sequence) -> list[int]:
        """The pages that it need not compute: never all of them, since its next token comes from the last one."""
        names = sequence.names
        if names is None:
            return []
        hashes = names.hashes[: (sequence.length - 1) // self.limits.page_tokens]
        return hashes[: self.pool.known(hashes)]

    def _find_below(self, sequence: Sequence, found: int) -> int:
        """Pages behind the first ``found`` that the tier has; those of a handoff come from elsewhere."""
        names = sequence.names
        if names is None or sequence.handoff:
            return 0
        return self.pool.loadable(names.hashes[found : (sequence.length - 1) // self.limits.page_tokens])

    def _name_pages(self, sequence: Sequence) -> None:
        """Give its full pages their names."""
        names = sequence.names
        if names is None:
            return
        full = min(sequence.computed // self.limits.page_tokens, len(names.hashes))
        while len(names.shared) < full:
            number = names.hashes[len(names.shared)]
            self.pool.name(number)
            names.shared.append(number)

    def _leave_pages(self, sequence: Sequence) -> None:
        shared: list[int] = []
        if sequence.names is not None:
            shared, sequence.names.shared = sequence.names.shared, []
        self.pool.leave(shared, sequence.pages - len(shared))
        sequence.pages = 0

    @staticmethod
    def _put(batch: Batch, sequence: Sequence, tokens: int) -> None:
        batch.items.append((sequence, tokens))
        of_prompt = max(0, min(sequence.computed + tokens, sequence.prompt) - sequence.computed)
        sequence.prefilled += of_prompt
        batch.prefill_tokens += of_prompt
        batch.decodes += of_prompt == 0

    def _sample(self, sequence: Sequence) -> EngineOutput:
        token, reason = sequence.sample()
        first, sequence.yielded = not sequence.yielded, True
        if reason is not None:
            self._drop(sequence)
        elif sequence.stage is Stage.PREFILL:
            sequence.phase = Phase.HELD
        return EngineOutput(
            work_id=sequence.work_id,
            tokens=[token],
            reason=reason,
            stop_reason=token if reason is Reason.STOP else None,
            cached_tokens=sequence.cached if first else None,
            loaded_tokens=sequence.loaded if first else 0,
            computed_tokens=sequence.prefilled if first else None,
        )

    def _drop(self, sequence: Sequence) -> None:
        self._leave_pages(sequence)
        sequence.phase = Phase.GONE
        del self.sequences[sequence.work_id]
