"""The engine as a worker sees it: tokens in, tokens out, one step at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from llmserve.bus.messages import KvChange, Reason, Stage


class EngineError(Exception):
    """The engine cannot start, or refused a request; the message is one line for a person."""


class EngineDied(EngineError):
    """The engine is gone with all that ran in it; only a new one helps."""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What a started engine is; constant while it lives."""

    api: str
    """Engine API of the bodies it reads, such as ``vllm-0.32.0``."""
    fingerprint: str
    """Of its KV pages: model, dtype, layout, page size, parallelism, engine version, ISA on CPUs."""
    max_model_len: int
    """Tokens of prompt and output together."""
    slots: int
    """Requests it runs at once."""
    step_tokens: int
    """Tokens it computes in one step at most."""
    pages_total: int
    page_tokens: int
    page_bytes: int
    """Of one page over all layers and ranks."""
    transports: str = ""
    """Engines that move pages, and why others do not: for people."""


@dataclass(frozen=True, slots=True)
class Work:
    """One attempt of a request, or one stage of it."""

    work_id: str
    """``<request_id>.<attempt>``: unique in the deployment."""
    stage: Stage
    body: bytes
    """The engine's own request."""
    whole_output: bool = False
    """See ``Request.whole_output``."""
    first_tokens: tuple[int, ...] = ()
    """Decode after a remote prefill: the output tokens that the prefill worker sampled."""
    handoff: bytes = b""
    """Decode after a remote prefill: ``EngineOutput.handoff`` of the prefill engine. Empty: compute everything."""
    ahead: bool = False
    """``handoff`` is an ``Offer``'s: its pages are fetched for the work that may follow, and nothing comes out."""
    tenant: str = ""
    """Whose it is, by the subject that it came on."""
    owner_salt: bytes = b""
    """The tenant's cache salt: the engine salts its pages with ``request_salt(owner_salt, salt in the body)``. Empty
    only where nothing but this engine's own test is on the bus: then the body's salt is used as it is."""
    compute_tokens_s: float = 0.0
    """How fast the engine computes prompts, as its worker measured it; 0 if unknown: what loads slower is not
    loaded."""


@dataclass(frozen=True, slots=True)
class EngineOutput:
    """What one step yielded for one piece of work."""

    work_id: str
    tokens: list[int]
    reason: Reason | None = None
    """Set on the last output. Of a prefill: why it ended, or None together with ``handoff``."""
    stop_reason: int | str | None = None
    cached_tokens: int | None = None
    """Prompt tokens that were not computed by this deployment for this request; with the first output."""
    loaded_tokens: int = 0
    """Of ``cached_tokens``, those that came from a tier below the engine's own memory."""
    computed_tokens: int | None = None
    """Prompt tokens that this engine computed; with the first output. 0 or 1 on decode after a handoff."""
    extra: bytes = b""
    """See ``Delta.extra``."""
    handoff: bytes = b""
    """Prefill done and its pages held under a lease: what a decode engine needs to get them."""
    pages: int = 0
    """Pages that ``handoff`` covers."""
    error: str = ""
    """With ``Reason.ERROR``: what went wrong, for the log."""


@dataclass(frozen=True, slots=True)
class Offer:
    """The first pages of a prompt that is still being computed, for a decode engine to fetch ahead."""

    work_id: str
    handoff: bytes
    """As ``EngineOutput.handoff``; it lasts no longer than the prefill does."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """One finished movement of pages, for metrics."""

    engine: str
    """``same_host``, ``nixl``, ``ucx``, ``nccl``, ``gloo``, ``simulated``; ``none`` if no engine was chosen."""
    direction: str
    """``pull`` or ``push``, as this end sees it; ``load``: a pull within the step that computes with the pages."""
    bytes_moved: int
    seconds: float
    failure: str = ""
    """Empty on success, else its kind: ``timeout``, ``stale``, ``peer``, ``fingerprint``, ``other``."""
    work_id: str = ""
    """For whom."""


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """Where the engine stands after its last step."""

    running: int = 0
    waiting: int = 0
    pages_free: int = 0
    load_tokens_s: dict[str, float] = field(default_factory=dict)
    """Prompt tokens that it loads a second from a ``Tier``, as measured of late."""
    steps: int = 0
    """Steps that have ended since the start, those that yielded nothing included: while it has work, it hangs if they
    do not grow."""


@dataclass(frozen=True, slots=True)
class Step:
    """All that one engine step yielded."""

    outputs: list[EngineOutput] = field(default_factory=list)
    released: list[str] = field(default_factory=list)
    """Work whose handed-off pages are free again: read, released, or expired."""
    transfers: list[Transfer] = field(default_factory=list)
    offers: list[Offer] = field(default_factory=list)
    prefill_tokens: int = 0
    """Prompt tokens computed in this step."""
    kv: list[KvChange] = field(default_factory=list)
    """Pages that can be reused from now on, or no more. A step may consist of these alone."""
    kv_unheard: int = 0
    """Times that the engine told of its pages, but could not be understood."""
    tiers: dict[str, dict[str, float]] = field(default_factory=dict)
    """By storage class, what happened there since the last such step; see ``kvstore.tiers.TierStats``."""


class Engine(ABC):
    """One model replica.

    With a prefix cache it names its pages by the short hashes of ``llmserve.bus.block_hashes``, salted as ``Work``
    says, and tells of all of them in its steps.
    """

    @abstractmethod
    async def start(self) -> EngineInfo:
        """Load the model and be ready for work. Raises ``EngineError``."""

    @abstractmethod
    def submit(self, work: Work) -> None:
        """Queue work; its outputs come from ``step``. Raises ``EngineError`` if the body is unreadable."""

    @abstractmethod
    def abort(self, work_ids: list[str]) -> None:
        """Stop the work and free its pages within one step, those held for a handoff too. Unknown ids are
        ignored. Each running one yields a last output with ``Reason.CANCELLED``."""

    @abstractmethod
    async def step(self) -> Step:
        """Wait for the next step that yields something. Raises ``EngineDied``."""

    @abstractmethod
    def load(self) -> EngineLoad: ...

    @abstractmethod
    async def close(self) -> None:
        """Stop the engine and leave no process behind; never raises."""
