"""A deployment in miniature: stream, gateways and workers that obey the protocol, over links that lose messages."""

from __future__ import annotations

import random
from collections import Counter, deque
from dataclasses import dataclass, field

from llmserve.bus.base import StoredRequest
from llmserve.bus.flow.actions import Action, Broadcast, CheckStored, Discard, NotifyGateway, SendGrant
from llmserve.bus.flow.core import RouterCore
from llmserve.bus.flow.entry import Entry, Place
from llmserve.bus.flow.events import Checked, Event, NoResponders, StreamRead, Tick
from llmserve.bus.flow.settings import RouterSettings
from llmserve.bus.messages import (
    Accepted,
    AttemptLost,
    Cancel,
    Failed,
    Finished,
    Grant,
    HandedOff,
    Heartbeat,
    Message,
    Prefilling,
    Reason,
    Refused,
    Rejected,
    Request,
    Role,
    Running,
    Stage,
    Sync,
    decode,
    encode,
)


def request(
    request_id: str,
    attempt: int = 0,
    prompt_tokens: int = 10,
    max_tokens: int = 10,
    api: str = "a1",
    body: bytes = b"body",
) -> Request:
    return Request(
        request_id=request_id,
        gateway="g0",
        attempt=attempt,
        created_s=0.0,
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        api=api,
        body=body,
    )


def stored(seq: int, tenant: str, of: Request, klass: str = "interactive") -> StoredRequest:
    return StoredRequest(seq, tenant, klass, of, encode(of))


def beat(member: str, role: Role, **more: object) -> Heartbeat:
    fields: dict[str, object] = {
        "host": "h",
        "pid": 1,
        "api": "a1",
        "fingerprint": "f1",
        "slots": 4,
        "prefill_tokens": 200,
        "pages_total": 100,
        "pages_free": 100,
        "page_tokens": 16,
        "page_bytes": 1000,
        "max_model_len": 1000,
        **more,
    }
    return Heartbeat(member=member, role=role, **fields)  # type: ignore[arg-type]


@dataclass
class Load:
    """What counts against the bounds."""

    tokens: int = 0
    kv_bytes: int = 0
    stages: Counter[Stage] = field(default_factory=Counter)
    tenants: Counter[str] = field(default_factory=Counter)

    @property
    def decoding(self) -> int:
        return self.stages[Stage.DECODE] + self.stages[Stage.WHOLE]

    def add(self, tenant: str, bound_tokens: int) -> None:
        self.tokens += bound_tokens
        self.tenants[tenant] += 1


@dataclass
class Job:
    of: Request
    grant: Grant
    held: bool = False
    handed_off: HandedOff | None = None
    lease_until_s: float = 0.0


@dataclass
class FakeWorker:
    """Runs what it is granted; its messages leave in order, in heartbeats the whole inventory."""

    name: str
    role: Role
    alive: bool = True
    jobs: dict[int, Job] = field(default_factory=dict)
    cancelled: set[str] = field(default_factory=set)
    out: deque[Message] = field(default_factory=deque)
    epoch: int = 0

    def heartbeat(self) -> Heartbeat:
        pages = sum(-(-(job.of.prompt_tokens + 1) // 16) for job in self.jobs.values())
        lines = [
            Running(
                seq=seq,
                attempt=job.of.attempt,
                stage=job.grant.stage,
                held=job.held,
                tenant=job.grant.tenant,
                prompt_tokens=job.of.prompt_tokens,
                max_tokens=job.of.max_tokens,
            )
            for seq, job in self.jobs.items()
        ]
        return beat(self.name, self.role, epoch=self.epoch, pages_free=max(0, 100 - pages), running=lines)


class World:
    """Drives a ``RouterCore`` and records what became of every accepted request."""

    def __init__(self, settings: RouterSettings, rng: random.Random, loss: float) -> None:
        self.settings, self.rng, self.loss = settings, rng, loss
        self.core = RouterCore(settings, random.Random(1))
        self.core.begin("r0", 1)
        self.chance = random.Random(2)
        """Of the standby, which does not change what happens to the leader."""
        self.standby = RouterCore(settings, random.Random(1))
        self.overheard: dict[str, set[int]] = {}
        """As ``told``, of the standby."""
        self.now_s = 0.0
        self.seq = 0
        self.made = 0
        self.given_up = False
        self.told: dict[str, set[int]] = {}
        """What the router can know that each worker runs: the last inventory that reached it, and grants since."""
        self.unheard: list[tuple[float, Rejected]] = []
        """Rejections lost on the way, and when their gateway looks."""
        self.stream: dict[int, StoredRequest] = {}
        self.workers: dict[str, FakeWorker] = {}
        self.outcome: dict[str, str] = {}
        """Of every accepted request: ``open`` or how it ended."""
        self.current: dict[str, StoredRequest] = {}
        self.live: dict[tuple[str, int, Stage], str] = {}
        """Grants whose worker has neither returned nor ended them."""
        self.served_tokens: dict[str, int] = {}

    # -- faults and arrivals

    def spawn(self, role: Role) -> None:
        worker = FakeWorker(f"w{len(self.workers)}", role)
        self.workers[worker.name] = worker
        self.tell(worker.heartbeat())

    def arrive(self, tenant: str, prompt_tokens: int, max_tokens: int, klass: str = "interactive") -> None:
        self.made += 1
        self.submit(tenant, request(f"q{self.made}", 0, prompt_tokens, max_tokens), klass)

    def submit(self, tenant: str, of: Request, klass: str = "interactive") -> None:
        self.seq += 1
        self.outcome.setdefault(of.request_id, "open")
        item = stored(self.seq, tenant, of, klass)
        self.stream[item.seq] = self.current[of.request_id] = item
        self.tell(item)

    def cancel(self, request_id: str) -> None:
        if self.outcome[request_id] != "open":
            return
        self.outcome[request_id] = "cancelled"
        self.stream.pop(self.current[request_id].seq, None)
        self.abort([request_id])
        if not self.lost():
            self.tell(Cancel(request_ids=[request_id]))

    def kill(self, worker: FakeWorker) -> None:
        worker.alive = False
        for job in worker.jobs.values():
            self.ended(job)
        worker.jobs.clear()
        worker.out.clear()

    def lost(self) -> bool:
        return self.rng.random() < self.loss

    def restart_router(self, *, warm: bool = False) -> None:
        """Another leader: it knows nothing but the stream and what the workers answer to its Sync; or ``warm``, also
        what it heard as a standby."""
        loss, self.loss = self.loss, 0.0
        epoch, self.given_up = self.core.epoch + 1, self.upset
        self.core = self.standby if warm else RouterCore(self.settings, random.Random(epoch))
        self.told = self.overheard if warm else {}
        self.standby, self.overheard = RouterCore(self.settings, random.Random(epoch)), {}
        for item in self.stream.values():
            self.standby.handle(item, self.now_s)
        self.core.begin("r0", epoch)
        self.broadcast(Sync(epoch=epoch, router="r0"))
        alive = [worker for worker in self.workers.values() if worker.alive]
        early = alive[: self.rng.randrange(len(alive) + 1)]
        for worker in early:
            self.deliver(worker)
        self.tell(StreamRead(self.seq, frozenset(self.stream)))
        for item in list(self.stream.values()):
            if not self.core.knows(item.seq):
                self.tell(item)
        for worker in alive:
            self.deliver(worker)
        self.dispatch()
        self.loss = loss

    # -- one step of the world

    def tell(self, event: Event) -> None:
        if isinstance(event, Heartbeat):
            self.told[event.member] = {line.seq for line in event.running if not line.held}
        actions = self.core.handle(event, self.now_s)
        self.told = {name: seqs for name, seqs in self.told.items() if name in self.core.ledger.workers}
        self.overhear(event)
        self.carry_out(actions)
        self.check()

    def overhear(self, event: Event) -> None:
        """The standby hears what the leader hears, and other messages are lost on the way to it."""
        of_the_leader_alone = isinstance(event, NoResponders | Checked | StreamRead)
        never_lost = isinstance(event, StoredRequest | Tick)
        if of_the_leader_alone or (not never_lost and self.chance.random() < self.loss):
            return
        if isinstance(event, Heartbeat):
            self.overheard[event.member] = {line.seq for line in event.running if not line.held}
        for action in self.standby.handle(event, self.now_s):
            if isinstance(action, CheckStored):
                self.standby.handle(Checked(action.seq, action.seq in self.stream), self.now_s)
        self.overheard = {name: seqs for name, seqs in self.overheard.items() if name in self.standby.ledger.workers}
        self.standby.check()

    def dispatch(self) -> None:
        found = self.load()
        on_worker = {name: self.on_worker(name) for name in self.core.ledger.workers}
        self.carry_out(self.core.dispatch(self.now_s))
        self.check()
        self.check_bounds(found)
        for worker in self.core.ledger.workers.values():
            spared = worker.beat.slots - self.settings.min_decode_slots
            jobs = [
                job
                for job in self.workers[worker.member].jobs.values()
                if not job.held and worker.member in self.told
            ]
            decoding = [job for job in jobs if job.grant.stage is not Stage.PREFILL and job.grant.klass == "batch"]
            assert self.upset or len(decoding) <= spared, f"{worker.member}: batch work in the slots that are spared"
        for name in self.core.ledger.workers:
            self.check_credit(name, on_worker[name])

    def elapse(self, seconds: float) -> None:
        self.now_s += seconds
        for worker in self.workers.values():
            for seq, job in list(worker.jobs.items()):
                if job.held and job.lease_until_s <= self.now_s:
                    del worker.jobs[seq]
        self.tell(Heartbeat(member="g0", role=Role.GATEWAY, host="h", pid=1))
        self.tell(Tick())
        self.look_up()
        self.dispatch()

    def beat_all(self) -> None:
        for worker in self.workers.values():
            if worker.alive:
                worker.out.append(worker.heartbeat())
                self.deliver(worker)
        self.dispatch()

    def deliver(self, worker: FakeWorker) -> None:
        while worker.out:
            message = worker.out.popleft()
            if not self.lost():
                self.tell(message)  # type: ignore[arg-type]

    def finish_one(self, worker: FakeWorker) -> None:
        """One of the worker's jobs makes its next step: offer its first pages, hand off, or end."""
        running = [seq for seq, job in worker.jobs.items() if not job.held]
        if not running:
            return
        seq = self.rng.choice(running)
        job = worker.jobs[seq]
        if job.grant.stage is Stage.PREFILL and self.rng.random() < 0.3:
            worker.out.append(Prefilling(worker=worker.name, seq=seq, request_id=job.of.request_id,
                                         attempt=job.of.attempt, params=b"p"))  # fmt: skip
            self.deliver(worker)
            return
        self.ended(job)
        if self.rng.random() < self.loss / 2:
            del worker.jobs[seq]
            worker.out.append(Failed(worker=worker.name, seq=seq, request_id=job.of.request_id,
                                     attempt=job.of.attempt, stage=job.grant.stage, error="boom"))  # fmt: skip
        elif job.grant.stage is Stage.PREFILL:
            job.held, job.lease_until_s = True, self.now_s + 30.0
            job.handed_off = HandedOff(worker=worker.name, seq=seq, request_id=job.of.request_id,
                                       attempt=job.of.attempt, tokens=[1], pages=1,
                                       page_bytes=self.page_bytes(job.of), lease_s=30.0, params=b"p")  # fmt: skip
            worker.out.append(job.handed_off)
        else:
            self.complete(worker, seq, job)
        self.deliver(worker)

    def complete(self, worker: FakeWorker, seq: int, job: Job) -> None:
        del worker.jobs[seq]
        if job.grant.handoff:
            handed_off = decode(job.grant.handoff)
            assert isinstance(handed_off, HandedOff)
            self.workers[handed_off.worker].jobs.pop(seq, None)
        if self.stream.pop(seq, None) is not None and self.current[job.of.request_id].seq == seq:
            self.outcome[job.of.request_id] = "finished"
        tenant = job.grant.tenant
        cost = job.of.prompt_tokens + 2 * self.output_tokens(job.of)
        self.served_tokens[tenant] = self.served_tokens.get(tenant, 0) + cost
        worker.out.append(
            Finished(worker=worker.name, seq=seq, request_id=job.of.request_id, attempt=job.of.attempt,
                     stage=job.grant.stage, reason=Reason.LENGTH, prompt_tokens=job.of.prompt_tokens,
                     output_tokens=self.output_tokens(job.of),
                     moved_bytes=self.moved_bytes(job.of) if job.grant.handoff else 0)
        )  # fmt: skip

    def output_tokens(self, of: Request) -> int:
        """With how many tokens it ends by itself."""
        return of.max_tokens

    def page_bytes(self, of: Request) -> int:
        """Size of the one page that it hands off."""
        return 1

    def moved_bytes(self, of: Request) -> int:
        """What of it its decode worker does not have yet."""
        return self.page_bytes(of)

    def abort(self, request_ids: list[str]) -> None:
        for worker in self.workers.values():
            worker.cancelled |= set(request_ids)
            for seq, job in list(worker.jobs.items()):
                if job.of.request_id in request_ids:
                    del worker.jobs[seq]
                    self.ended(job)
                    self.send_cancelled(worker, job.of, seq, job.grant.stage)

    def send_cancelled(self, worker: FakeWorker, of: Request, seq: int, stage: Stage) -> None:
        worker.out.append(Finished(worker=worker.name, seq=seq, request_id=of.request_id, attempt=of.attempt,
                                   stage=stage, reason=Reason.CANCELLED))  # fmt: skip

    def ended(self, job: Job) -> None:
        self.live.pop((job.of.request_id, job.of.attempt, job.grant.stage), None)

    # -- actions

    def carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, SendGrant):
                self.receive(action)
            elif isinstance(action, NotifyGateway):
                if not self.lost():
                    self.notify(action)
                elif isinstance(action.message, Rejected):
                    self.unheard.append((self.now_s + 5.0, action.message))
            elif isinstance(action, Discard):
                self.stream.pop(action.seq, None)
            elif isinstance(action, CheckStored):
                self.tell(Checked(action.seq, action.seq in self.stream))
            elif isinstance(action, Broadcast):
                self.broadcast(action.message)

    def notify(self, action: NotifyGateway) -> None:
        message = action.message
        current = self.current[message.request_id]
        if self.outcome[message.request_id] != "open" or message.attempt != current.request.attempt:
            return
        if isinstance(message, Rejected):
            self.outcome[message.request_id] = "rejected"
            self.abort([message.request_id])
            if not self.lost():
                self.tell(Cancel(request_ids=[message.request_id]))
        elif isinstance(message, AttemptLost):
            of = current.request
            again = request(of.request_id, of.attempt + 1, of.prompt_tokens, of.max_tokens)
            self.submit(current.tenant, again, current.klass)
            self.stream.pop(current.seq, None)

    def look_up(self) -> None:
        """A gateway that hears nothing for 5 s looks for its request, and resubmits it if it is off the stream."""
        due = [message for due_s, message in self.unheard if due_s <= self.now_s]
        self.unheard = [item for item in self.unheard if item[0] > self.now_s]
        for message in due:
            lost = AttemptLost(request_id=message.request_id, attempt=message.attempt, seq=0, cause="gone")
            self.notify(NotifyGateway("g0", lost))

    def broadcast(self, message: Cancel | Sync) -> None:
        if isinstance(message, Cancel):
            self.abort(message.request_ids)
            return
        for worker in self.workers.values():
            if worker.alive:
                worker.epoch = message.epoch
                worker.out.extend(job.handed_off for job in worker.jobs.values() if job.handed_off is not None)
                worker.out.append(worker.heartbeat())

    def receive(self, action: SendGrant) -> None:
        grant, worker = action.grant, self.workers[action.worker]
        if action.worker in self.told:
            self.told[action.worker].add(grant.seq)
        of = decode(grant.request)
        assert isinstance(of, Request)
        key = (of.request_id, of.attempt, grant.stage)
        assert key not in self.live, f"{key} is granted twice"
        if not worker.alive:
            self.tell(NoResponders(worker.name, grant.seq))
        elif self.lost():
            pass
        elif of.request_id in worker.cancelled:
            self.send_cancelled(worker, of, grant.seq, grant.stage)
        elif self.lost():
            worker.out.append(Refused(worker=worker.name, seq=grant.seq, attempt=of.attempt, stage=grant.stage,
                                      reason="busy"))  # fmt: skip
        else:
            self.live[key] = worker.name
            worker.jobs[grant.seq] = Job(of, grant)
            worker.out.append(Accepted(worker=worker.name, seq=grant.seq, attempt=of.attempt, stage=grant.stage,
                                       epoch=grant.epoch))  # fmt: skip

    # -- what must hold

    def check(self) -> None:
        self.core.check()

    def running(self, name: str) -> dict[int, tuple[str, Stage, int, int]]:
        """Tenant, stage, prompt and bound of tokens of all that the router can know that a worker runs, and of what
        it believes so."""
        worker, book = self.workers[name], self.core.ledger.workers[name].book
        jobs = {
            seq: (job.grant.tenant, job.grant.stage, job.of.prompt_tokens, job.of.prompt_tokens + job.of.max_tokens)
            for seq, job in worker.jobs.items()
            if worker.alive and not job.held and seq in self.told[name]
        }
        return jobs | {e.seq: (e.tenant, e.stage, e.prompt_tokens, e.bound_tokens) for e in book.values()}

    def load(self) -> Load:
        """What runs on all workers that the router has heard of, and what waits between them."""
        load = Load()
        for state in self.core.ledger.workers.values():
            load.kv_bytes += state.pages_in_use * state.beat.page_bytes
        load.kv_bytes += sum(self.kv_bytes_to_come(entry) for entry in self.core.ledger.entries.values())
        for name in self.core.ledger.workers:
            for tenant, stage, _, bound_tokens in self.running(name).values():
                load.add(tenant, bound_tokens)
                load.stages[stage] += 1
        for entry in self.core.ledger.entries.values():
            gone = entry.worker is not None and entry.worker.gone
            if entry.place is Place.WAITING or gone:
                load.add(entry.tenant, entry.bound_tokens)
            if gone:
                load.stages[entry.stage] += 1
        return load

    def kv_bytes_to_come(self, entry: Entry) -> int:
        """What its decode is going to take of a worker's memory, where nothing of it is taken yet."""
        handed = entry.place is Place.WAITING
        if not handed and (entry.worker is None or entry.stage is not Stage.PREFILL):
            return 0
        if entry.ahead is not None and not entry.ahead.gone and entry.seq in entry.ahead.reserved:
            return 0
        return -(-(entry.prompt_tokens + entry.max_tokens) // 16) * 1000

    def check_bounds(self, found: Load) -> None:
        """``found``: the load before the dispatch. A worker that falls silent and comes back may bring more than the
        bounds allow, and then nothing more must be granted."""
        load, bounds = self.load(), self.settings
        kv = bounds.max_kv_hbm_bytes or 1 << 60
        assert load.kv_bytes <= max(found.kv_bytes, kv), "KV pages in use"
        assert load.tokens <= max(found.tokens, bounds.max_tokens_in_flight or 1 << 60), "tokens in flight"
        prefill, decode = bounds.max_prefill_concurrency or 1 << 60, bounds.max_decode_concurrency or 1 << 60
        assert load.stages[Stage.PREFILL] <= max(found.stages[Stage.PREFILL], prefill), "prefill concurrency"
        assert load.decoding <= max(found.decoding, decode), "decode concurrency"
        for tenant, number in load.tenants.items():
            bound = bounds.tenant(tenant).max_concurrency or 1 << 60
            assert number <= max(found.tenants[tenant], bound), f"{tenant} runs {number}"
        if not self.upset:
            assert load.tokens <= (bounds.max_tokens_in_flight or 1 << 60)
            assert load.stages[Stage.PREFILL] <= prefill
            assert load.decoding <= decode
            for tenant, number in load.tenants.items():
                assert number <= (bounds.tenant(tenant).max_concurrency or 1 << 60), f"{tenant} runs {number}"

    def on_worker(self, name: str) -> tuple[int, int, int]:
        """Number, prompt tokens and pages of what a worker runs."""
        jobs, state = self.running(name).values(), self.core.ledger.workers[name]
        pages = sum(state.pages_for(prompt, bound - prompt, 512) for _, _, prompt, bound in jobs)
        return len(jobs), sum(prompt for _, _, prompt, _ in jobs), pages

    def check_credit(self, name: str, found: tuple[int, int, int]) -> None:
        """A worker with more than its credit is granted no more; without upsets none ever has more."""
        state, (number, prompt_tokens, pages) = self.core.ledger.workers[name], self.on_worker(name)
        slots, credit, total = state.beat.slots, state.beat.prefill_tokens, state.beat.pages_total
        if self.upset:
            slots, credit, total = max(found[0], slots), max(found[1], credit), max(found[2], total)
        assert number <= slots, f"{name} has more than its slots"
        if number > 1:
            assert state.stage is not Stage.PREFILL or prompt_tokens <= credit, f"{name}: prefill credit"
            assert pages <= total, f"{name}: more pages than it has"

    @property
    def upset(self) -> bool:
        """Whether any attempt was given up so far, by this leader or an earlier one: it may run on somewhere."""
        return self.given_up or sum(self.core.stats.attempts_lost.values()) > 0

    def settle(self, limit_s: float = 300.0) -> None:
        """No more faults: let everything end."""
        self.loss = 0.0
        until_s = self.now_s + limit_s
        while self.now_s < until_s and (self.stream or self.core.ledger.entries or self.unheard):
            self.elapse(0.25)
            self.beat_all()
            for worker in self.workers.values():
                if worker.alive:
                    self.finish_one(worker)
            self.dispatch()
